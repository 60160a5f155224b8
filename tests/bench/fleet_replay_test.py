#!/usr/bin/env python3
"""A few requests of both loads over real daemons: all served, counted alike, found in caches. Usage: fleet_replay_test.py BINARY COPPICED"""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

COPPICED = sys.argv.pop()
BINARY = sys.argv.pop()
POLICIES = ["perfect_affinity", "router"]
DIVISOR = 2
TURNS, CONVERSATIONS = 4, 3


def trace():
    """Conversations that take turns; each turn has 4 blocks of 512 tokens more, the first block is common to all."""
    rows = []
    for turn in range(TURNS):
        for conversation in range(CONVERSATIONS):
            blocks = [0, *(1 + 1000 * conversation + i for i in range(4 * (turn + 1)))]
            rows.append({"timestamp": 0, "input_length": 512 * len(blocks), "output_length": 80, "hash_ids": blocks})
    return rows


class FleetReplay(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory, "trace.jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in trace()), encoding="utf-8")
            # One request at a time: what each finds in a cache does not hang on timing.
            done = subprocess.run([BINARY, COPPICED, "--rl_groups=2", "--rl_samples=2", "--rl_open=1", "--trace_open=1", "--policies=" + ",".join(POLICIES),
                                   f"--trace={path}", f"--trace_divisor={DIVISOR}", "--cache_tokens=262144"],
                                  stdout=subprocess.PIPE, text=True, check=True)  # fails unless replies and metrics agree
        cls.lines = [json.loads(line) for line in done.stdout.splitlines()]

    def of(self, load):
        return {line["policy"]: line for line in self.lines if line["load"] == load}

    def test_every_policy_served_every_load(self):
        self.assertEqual([(line["load"], line["policy"]) for line in self.lines],
                         [(load, policy) for load in ("rl", "mooncake") for policy in POLICIES])
        for line in self.lines:
            self.assertEqual(line["errors"], 0, line)
            self.assertEqual(line["requests"], 2 + 2 * 2 * 2 if line["load"] == "rl" else TURNS * CONVERSATIONS, line)
            self.assertGreater(line["cached_tokens"], 0, line)

    def test_a_load_is_the_same_for_every_policy(self):
        for load in ("rl", "mooncake"):
            for key in ("prompt_tokens", "completion_tokens"):
                self.assertEqual(len({line[key] for line in self.of(load).values()}), 1, (load, key))

    def test_lengths_of_the_trace_are_divided(self):
        line = self.of("mooncake")["router"]
        self.assertEqual(line["prompt_tokens"], sum(row["input_length"] for row in trace()) // DIVISOR)
        self.assertEqual(line["completion_tokens"], sum(row["output_length"] for row in trace()) // DIVISOR)

    def test_perfect_affinity_finds_what_it_expects(self):
        for load in ("rl", "mooncake"):
            line = self.of(load)["perfect_affinity"]
            self.assertGreaterEqual(line["cached_tokens"], line["expected_tokens"], load)
        # Every turn but the first finds the one before, every conversation but the first the common block: all on one replica,
        # which was the least loaded whenever a conversation began.
        before = sum(512 * (1 + 4 * turn) for turn in range(1, TURNS)) * CONVERSATIONS + 512 * (CONVERSATIONS - 1)
        self.assertEqual(self.of("mooncake")["perfect_affinity"]["expected_tokens"] * DIVISOR, before)


if __name__ == "__main__":
    unittest.main()
