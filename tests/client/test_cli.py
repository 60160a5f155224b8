"""The command line against a scripted daemon."""

import json
import random

import pytest
from coppice.cli import bench, train_demo
from coppice.cli.main import EXIT_FAILED, EXIT_UNREACHABLE, main
from coppice.cli.tasks import TASKS


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["chat"], ["train-demo"], ["status"], ["bench"]]
)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0 and "usage: coppice" in capsys.readouterr().out


def test_generate_streams_one_sample_and_prints_several(daemon, capsys):
    assert main(["generate", "hi", "--address", daemon.address, "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == "AAA\n"
    assert main(["generate", "hi", "--raw", "-n", "2", "--address", daemon.address]) == 0
    assert "--- sample 1 (length)\nBBB" in capsys.readouterr().out


def test_chat_keeps_the_conversation(daemon, capsys, monkeypatch):
    lines = iter(["one", "two", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", "--address", daemon.address, "--max-tokens", "1"]) == 0
    prompt = bytes(daemon.requests[-1].prompt.tokens.ids).decode()
    assert prompt == "<user>one<assistant>A<user>two<assistant>"


def test_status_as_text_and_json(daemon, tmp_path, capsys):
    port_file = tmp_path / "ports"
    port_file.write_text(json.dumps({"grpc": int(daemon.address.split(":")[1]), "http": 1}))
    assert main(["status", "--port-file", str(port_file)]) == 0
    assert "weights 1 MiB" in capsys.readouterr().out
    assert main(["status", "--json", "--address", daemon.address]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "fake"


def test_an_absent_daemon_says_what_to_do(daemon, capsys):
    daemon.stop()
    assert main(["status", "--address", daemon.address]) == EXIT_UNREACHABLE
    error = capsys.readouterr().err
    assert daemon.address in error and "coppiced --model" in error
    assert main(["bench", "--address", daemon.address, "--requests", "1"]) == EXIT_UNREACHABLE


def test_an_absent_port_file_is_a_plain_error(capsys):
    assert main(["status", "--port-file", "/nonexistent/ports"]) == EXIT_FAILED
    assert "/nonexistent/ports" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(daemon, capfd, monkeypatch):
    def leave(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", leave)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert main(["status", "--address", daemon.address]) == EXIT_FAILED
    assert capfd.readouterr().err == ""


def test_bench_reports_percentiles(daemon, capsys):
    args = ["--requests", "5", "--rate", "1000", "--max-tokens", "3", "--n", "2", "--json"]
    assert main(["bench", "--address", daemon.address, *args]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["requests"] == 5 and summary["errors"] == {}
    assert set(summary["time_to_first_token_ms"]) == {"p50", "p90", "p99"}
    assert summary["completion_tokens_per_second"] > 0 and summary["hit_rate"] > 0


def test_percentile_is_the_nearest_rank():
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    assert [bench.percentile(values, p) for p in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_only_the_exact_answer_earns_the_full_reward(name):
    task, rng = TASKS[name], random.Random(0)
    for _ in range(50):
        question = task.draw(rng)
        assert task.reward(question, question.answer) == 1.0
        assert task.reward(question, "The answer is " + question.answer) < 1.0
        assert task.reward(question, "") == 0.0
        assert question.messages[0] == task.draw(rng).messages[0]


def test_sorting_grades_positions():
    task = TASKS["number-sorting"]
    question = train_demo.Question(messages=[], answer="1, 3, 7, 9")
    assert task.reward(question, "1, 3, 9, 7") == pytest.approx(0.1 + 0.9 / 2)
    assert task.reward(question, "1, 3, 7, 9, 9") < 1.0
    assert task.reward(question, "1 3 7 9") == 0.0


def test_train_demo_fails_when_the_reward_does_not_rise(daemon, tmp_path, capsys):
    summary = tmp_path / "summary.json"
    args = ["--steps", "6", "--prompts", "2", "--n", "2", "--summary", str(summary)]
    plot = tmp_path / "curve.png"
    args += ["--plot", str(plot), "--address", daemon.address]
    assert main(["train-demo", *args]) == EXIT_FAILED
    captured = capsys.readouterr()
    assert "want the mean reward of the last 3 steps above" in captured.err
    assert captured.out.count("reward 0.000") == 6 and "dedup=5.0" in captured.out
    assert len(json.loads(summary.read_text())["steps"]) == 6
    assert plot.read_bytes().startswith(b"\x89PNG")
