"""Opening an SAE beside the subject and the site that it belongs to: the same for every command that reads one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from undertow.cli.common import console

if TYPE_CHECKING:
    from sae.dictionary import Dictionary
    from undertow.subjects.sites import Site
    from undertow.subjects.subject import Subject

SaeArgument = Annotated[str, typer.Argument(metavar="SAE", help="A folder, or a packaged name such as smollm2/12.")]
SiteOption = Annotated[str | None, typer.Option("--site", help="Where to read, if the SAE does not say.")]
SameModelOption = Annotated[bool, typer.Option(
    "--same-model", help="Take the subject for the model of the SAE although its name differs.")]


class Place(NamedTuple):
    """What the user said about the subject and the site; None means those that the SAE was trained on."""

    model: str | None
    site: str | None
    same_model: bool


def open_place(sae: str, dictionary: Dictionary, place: Place, device: str = "auto") -> tuple[Subject, Site]:
    """The subject and the site that `dictionary` is to be read with; warnings about the fit are shown.

    Raises DictionaryError if neither the SAE nor the user names them, or if the SAE does not fit.
    """
    from sae.formats import check_fits
    from undertow.core.errors import DictionaryError
    from undertow.subjects.load import load_subject

    model, site = place.model or dictionary.provenance.model_name, place.site or dictionary.provenance.hook_name
    for value, meaning, option in ((model, "model", "--model"), (site, "site", "--site")):
        if not value:
            raise DictionaryError(f"{sae} does not say which {meaning} it was trained on", f"name it with {option}")
    subject = load_subject(model, device)
    for warning in check_fits(dictionary, subject.name, subject.d_model, site, subject.digest, place.same_model):
        console().print(warning, style="yellow", markup=False)
    return subject, subject.site(site)
