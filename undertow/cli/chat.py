"""`undertow subject chat`: a conversation in the terminal, with a subject as it is and, beside it, under a recipe."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, final

import typer
from rich.table import Table
from rich.text import Text

from undertow.cli.common import JsonOption, OptionalOutOption, SeedOption, console, emit
from undertow.cli.opening import SameModelOption
from undertow.cli.surgery import RecipeOption, SaeOption, Surgery, marked, open_subject, safe, write_on, write_result
from undertow.core.errors import TextError, UserError

if TYPE_CHECKING:
    from undertow.subjects.sampling import Sampling
    from undertow.subjects.subject import Subject

app = typer.Typer()
WIDE = 100  # columns of a terminal from which two texts stand side by side
PLAIN, OPERATED = "plain", "operated"


class Turn(NamedTuple):
    """One line and what was answered: side → text, and where the recipe fired."""

    user: str
    seed: int
    texts: dict[str, str]
    firings: int
    positions: int

    def to_json(self) -> dict[str, Any]:
        """The turn as JSON values; without a recipe there is nothing that could have fired."""
        fired = {"firings": self.firings, "positions": self.positions} if OPERATED in self.texts else {}
        return {"user": self.user, "seed": self.seed, **self.texts, **fired}


@final
class Conversation:
    """What was said on every side: each has heard the same lines and goes on from its own answers.

    A subject with a chat template answers; one without goes on with the text that the user has begun.

    Args:
        subject: the model.
        surgery: the recipe of the operated side, if there is one.
        sampling: how to sample.
        seed: turn n of every side is drawn from the stream n of this seed.
        system: system message, for a subject with a chat template.
    """

    def __init__(self, subject: Subject, surgery: Surgery | None, sampling: Sampling, seed: int, system: str = "") -> None:
        self.subject, self.surgery, self.sampling, self.seed = subject, surgery, sampling, seed
        self.answers = bool(subject.tokenizer.chat_template)
        if system and not self.answers:
            raise TextError(f"--system {system!r} needs a subject with a chat template, and {subject.name} has none",
                            "leave --system away: begin a text, and the subject goes on with it")
        self._opening = [("system", system)] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the same lines then get the same answers again."""
        sides = [PLAIN] if self.surgery is None else [PLAIN, OPERATED]
        self._messages = {side: list(self._opening) for side in sides}
        self._stories = dict.fromkeys(sides, "")
        self._turns = 0

    @property
    def begun(self) -> bool:
        """Whether anything was said since the last reset."""
        return self._turns > 0

    def say(self, line: str) -> Turn:
        """Answer a line, on every side from the same seed. After an error nothing has been said.

        Raises TextError: the line holds a special mark, or the conversation fills what the model can read.
        """
        from undertow.core.seeds import derive_seed

        seed = derive_seed(self.seed, "chat", self._turns)
        prompts = {side: self._prompt(side, line) for side in self._messages}
        written = {side: write_on(self.subject, self.surgery if side == OPERATED else None, [ids], self.sampling, [seed])
                   for side, ids in prompts.items()}
        texts = {side: result.texts[0].text for side, result in written.items()}
        for side, text in texts.items():
            self._messages[side] += [("user", line), ("assistant", text)]
            self._stories[side] = _joined(self._stories[side], line) + text
        self._turns += 1
        last = written[OPERATED if OPERATED in written else PLAIN]
        return Turn(line, seed, texts, last.firings, last.positions)

    def _prompt(self, side: str, line: str) -> list[int]:
        from undertow.subjects.chat import render

        if self.answers:
            ids = render(self.subject.tokenizer, [*self._messages[side], ("user", line)], reply=True).ids
        else:
            ids = self.subject.encode(_joined(self._stories[side], line))
        limit = getattr(self.subject.hf_model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) + self.sampling.max_new_tokens > limit:
            raise TextError(f"the conversation has {len(ids)} tokens, and {self.sampling.max_new_tokens} more would pass the "
                            f"{limit} that {self.subject.name} can read", "/reset begins anew")
        return ids


def _joined(story: str, line: str) -> str:
    """The text so far and what the user adds, with a blank between them where there is none."""
    blank = " " if story and line and not story[-1].isspace() and not line[0].isspace() else ""
    return story + blank + line


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A subject's name, a Hugging Face name, or a local folder.")],
    recipe: RecipeOption = None,
    sae: SaeOption = None,
    same_model: SameModelOption = False,
    system: Annotated[str, typer.Option(help="System message, for a subject with a chat template.")] = "",
    seed: SeedOption = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass; 1 switches it off.")] = 1.0,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """Talk to a subject; with --recipe also to the operated one, which hears the same lines and draws from the same seed.

    A subject without a chat template goes on with the text that you begin. /reset begins anew, /quit ends. Lines may be piped.
    """
    from undertow.core.storage import refuse_existing
    from undertow.subjects.sampling import Sampling

    if out is not None:
        refuse_existing(out)
    sampling = Sampling.checked({"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}, "chat")
    began = time.perf_counter()
    subject, surgery = open_subject(model, recipe, sae, same_model)
    conversation = Conversation(subject, surgery, sampling, seed, system)
    _introduce(conversation)
    turns = [turn.to_json() for turn in _talk(conversation)]
    operated = {} if surgery is None else {"recipe": surgery.recipe.name, "digest": surgery.recipe.digest()}
    result = {"model": subject.name, **operated, "seed": seed, "turns": turns}
    if out is not None:
        write_result(out, "conversation", surgery, result, {"sae": sae, "system": system, **sampling.model_dump()})
        console().print(f"written to {out}", markup=False)
    if json_:
        emit({**result, "wall_s": round(time.perf_counter() - began, 2)}, as_json=True)


def _introduce(conversation: Conversation) -> None:
    does = "answers" if conversation.answers else "has no chat template: begin a text, and it goes on (an empty line: further)"
    console().print(f"{conversation.subject.name} {does}; /reset begins anew, /quit ends", style="dim", markup=False)
    if conversation.surgery is not None:
        console().print(conversation.surgery.recipe.explain(), style="dim", markup=False)


def _talk(conversation: Conversation) -> list[Turn]:
    """Read and answer lines until /quit or the end of the input; one that cannot be answered is only refused."""
    turns: list[Turn] = []
    while (line := _read()) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
            console().print("a new conversation", style="dim")
        elif line.startswith("/"):
            console().print(f"unknown command {safe(line)!r}: there are /reset and /quit", markup=False)
        elif line or (conversation.begun and not conversation.answers):
            try:
                turns.append(conversation.say(line))
            except UserError as error:
                console().print(f"error: {error}", style="yellow", markup=False)
            else:
                _show(turns[-1], conversation)
    return turns


def _read() -> str | None:
    """The next line, without blanks at its ends; None at the end of the input. A piped line is shown as if typed."""
    typed = sys.stdin.isatty()
    try:
        line = console().input(Text("you> ", style="bold") if typed else "").strip()
        line.encode()
    except EOFError:
        if typed:
            console().print()
        return None
    except UnicodeError as error:
        raise TextError(f"a line is not UTF-8: {error}", "convert the input: iconv -f latin1 -t utf-8") from None
    if not typed:
        console().print(f"you> {safe(line)}", style="bold", markup=False)
    return line


def _show(turn: Turn, conversation: Conversation) -> None:
    from undertow.studies.stories import compare

    screen = console()
    if OPERATED not in turn.texts:
        screen.print(Text(safe(turn.texts[PLAIN].strip()) + "\n"))
        return
    sides = compare(turn.texts[PLAIN].strip(), turn.texts[OPERATED].strip())
    left, right = (marked(pieces, screen.is_terminal) for pieces in sides)
    assert conversation.surgery is not None
    fired = f"{conversation.surgery.recipe.name} fired at {turn.firings} of {turn.positions} tokens"
    heads = Text(PLAIN, style="bold"), Text(f"{OPERATED}, {fired}", style="bold")
    if screen.width < WIDE:
        screen.print(Text("\n").join([heads[0], left, Text(), heads[1], right, Text()]), soft_wrap=not screen.is_terminal)
        return
    table = Table.grid(padding=(0, 4), expand=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    table.add_row(*heads)
    table.add_row(left, right)
    screen.print(table, soft_wrap=False)
    screen.print()
