"""The answer, taken out of what llama-cli prints, however it arrives."""

from __future__ import annotations

import pytest

from pyllamarun.run.answer import AnswerFilter, as_typed

BANNER = "\n\nLoading model... \n\n▄▄ ▄▄\n\nbuild      : b11312\n\n> not the prompt\n\n"


def through(prompt: str, printed: str, piece: int) -> str:
    answer = AnswerFilter(prompt)
    pieces = [printed[i : i + piece] for i in range(0, len(printed), piece)]
    return "".join(answer.feed(part) for part in pieces) + answer.finish()


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Hi", "Hello!"),
        ("Hi", "Two\n\nparagraphs, and > a quote\n> Hi\n."),
        ("two\nlines", "Yes."),
        ("What is said at the end?", "Exiting... is said."),
        ("Nothing?", ""),
    ],
)
def test_the_answer_and_nothing_else(prompt: str, answer: str, piece: int) -> None:
    printed = f"{BANNER}> {prompt}\n{answer}\n\n\n\nExiting...\n"
    assert through(prompt, printed, piece) == answer


@pytest.mark.parametrize("piece", [1, 13, 10_000])
def test_a_long_prompt_is_echoed_cut_off(piece: int) -> None:
    prompt = "ä" * 400 + "\r\nend"
    shown = (prompt.encode()[:500]).decode("utf-8", "replace") + " ... (truncated)"
    assert through(prompt, f"{BANNER}> {shown}\nYes.\n\nExiting...\n", piece) == "Yes."
    assert through("a\r\nb", f"{BANNER}> a\r\nb\nYes.\n\nExiting...\n", piece) == "Yes."


@pytest.mark.parametrize("piece", [1, 13, 10_000])
def test_a_refusal_of_the_server_is_no_answer(piece: int) -> None:
    refusal = "Error: request (280 tokens) exceeds the available context size (256 tokens), try increasing it"
    answer = AnswerFilter("Hi")
    printed = f"{BANNER}> Hi\n{refusal}\n\nExiting...\n"
    fed = [answer.feed(printed[i : i + piece]) for i in range(0, len(printed), piece)]
    assert "".join(fed) + answer.finish() == ""
    assert answer.refusal == refusal


def test_no_answer_when_it_ends_before() -> None:
    assert through("Hi", BANNER, 1000) == ""


def test_an_answer_that_is_cut_off_is_kept() -> None:
    assert through("Hi", f"{BANNER}> Hi\nOnce upon a", 3) == "Once upon a"


def test_a_prompt_is_not_a_command() -> None:
    assert as_typed("/exit") == " /exit"
    assert as_typed("exit/") == "exit/"
