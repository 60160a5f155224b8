#!/usr/bin/env python3
"""Runs every subcommand of coppice_bench on a tiny model and checks what it prints. Usage: smoke_test.py BINARY"""
import json
import subprocess
import sys
import unittest

BINARY = sys.argv.pop()
KEYS = ["bench", "shape", "seconds", "bound_seconds", "bound", "ratio", "peer", "peer_seconds", "device", "commit"]
TINY = ["--geometry", "tiny-qwen3", "--prompt=40", "--response", "3", "--group", "2", "--repeats", "1", "--threads=1"]


def run(*arguments):
    return subprocess.run([BINARY, *arguments], capture_output=True, text=True)


class CoppiceBench(unittest.TestCase):
    def lines_of(self, *arguments):
        done = run(*arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def check(self, bench, passes, *arguments):
        lines = self.lines_of(bench, *TINY, *arguments)
        self.assertEqual([line["shape"].get("pass") for line in lines], passes)
        for line in lines:
            self.assertEqual([key for key in line if key != "counts"], KEYS)
            self.assertEqual(line["bench"], bench)
            self.assertEqual(line["shape"]["prompt"], 40)
            self.assertGreater(line["seconds"], 0)
            self.assertGreater(line["bound_seconds"], 0)
            self.assertAlmostEqual(line["ratio"], line["bound_seconds"] / line["seconds"])

    def test_prefill(self):
        self.check("prefill", [None])

    def test_decode_in_all_modes(self):
        self.check("decode", [None])
        self.check("decode", [None], "--mode=flat")
        self.check("decode", [None], "--mode=ungrouped")

    def test_train_step_in_both_modes(self):
        self.check("train_step", ["forward_backward", "adamw"])
        self.check("train_step", ["forward_backward", "adamw"], "--mode", "flat")

    def test_train_step_counts_what_it_runs(self):
        for mode, tokens, prompt_tokens in (("shared", 44, 40), ("flat", 84, 80), ("kept", 4, 0)):
            counts = self.lines_of("train_step", *TINY, "--mode", mode)[0]["counts"]
            self.assertEqual((counts["tokens_run"], counts["prompt_tokens_run"]), (tokens, prompt_tokens), mode)
            self.assertEqual(counts["recompute"], 0)
            self.assertGreater(counts["activation_bytes"], 0)

    def test_train_step_by_phases(self):
        line = self.lines_of("train_step", *TINY, "--phases=1")[0]
        phases = line["phases"]
        parts = [phases[name] for name in ("matmul", "attention", "attention_backward", "norm", "rope", "gated_matmul", "head",
                                           "rows", "memory", "gaps")]
        self.assertGreater(min(parts), 0)
        self.assertAlmostEqual(sum(parts), phases["total"])

    def test_adamw(self):
        self.check("adamw", ["norm", "update"])

    def test_logprob_head(self):
        self.check("logprob_head", ["forward", "backward"])

    def test_radix(self):
        self.check("radix", ["miss", "hit"])

    def test_placement(self):
        self.check("placement", ["choose", "whole"])

    def test_attention_in_both_modes(self):
        self.check("attention", ["forward", "backward"])
        self.check("attention", ["forward", "backward"], "--mode=flat")

    def test_help_names_every_option(self):
        text = run("--help").stdout
        for option in ["geometry", "prompt", "response", "group", "mode", "device", "threads", "repeats", "seed"]:
            self.assertIn("--" + option, text)

    def test_bad_arguments_are_refused(self):
        for arguments in (["--nonsense", "1"], ["prefill", "--prompt"], ["prefill", "--prompt", "0"], ["radix", "twice"],
                          ["train_step", "--mode", "half"], ["unknown"], []):
            done = run(*arguments)
            self.assertEqual(done.returncode, 2, arguments)
            self.assertIn("see --help", done.stderr)
        self.assertIn("want one of", run("prefill", "--geometry", "huge").stderr)


if __name__ == "__main__":
    unittest.main()
