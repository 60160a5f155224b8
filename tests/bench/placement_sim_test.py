#!/usr/bin/env python3
"""Placement keeps the hits of perfect affinity and balances as well. Usage: placement_sim_test.py BINARY

On the simulated load of reinforcement learning; with COPPICE_MOONCAKE_TRACE=conversation_trace.jsonl on that trace too (where it
comes from: server/placement/README.md)."""
import json
import os
import subprocess
import sys
import unittest

BINARY = sys.argv.pop()
TRACE = os.environ.get("COPPICE_MOONCAKE_TRACE")
POLICIES = ["random", "round_robin", "least_loaded", "consistent_hash", "placement", "perfect_affinity", "pooled_cache"]


class PlacementSim(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        trace = ["--trace", TRACE] if TRACE else []
        done = subprocess.run([BINARY, *trace], capture_output=True, text=True, check=True)
        cls.lines = [json.loads(line) for line in done.stdout.splitlines()]
        cls.loads = ["rl", "mooncake"] if TRACE else ["rl"]

    def of(self, load):
        return {line["policy"]: line for line in self.lines if line["load"] == load}

    def test_every_policy_ran_on_every_load(self):
        self.assertEqual([(line["load"], line["policy"]) for line in self.lines],
                         [(load, policy) for load in self.loads for policy in POLICIES])

    def test_placement_hits_and_balances(self):
        for load in self.loads:
            placement, oracle = self.of(load)["placement"], self.of(load)["perfect_affinity"]
            self.assertGreaterEqual(placement["of_perfect_affinity"], 0.95, load)
            # Decode tokens over the whole run, so work is shared evenly...
            self.assertLessEqual(placement["load_max_over_mean"], 1.25, load)
            # ... and at each instant, where few requests of unequal length leave every policy uneven, about as well as the oracle.
            self.assertLessEqual(placement["open_load_max_over_mean"], 1.1 * oracle["open_load_max_over_mean"], load)

    def test_policies_that_ignore_prefixes_lose_hits(self):
        for load in self.loads:
            for policy in ("random", "round_robin", "least_loaded"):
                self.assertLess(self.of(load)[policy]["of_perfect_affinity"], 0.75, load)

    def test_hashing_alone_does_not_balance(self):
        for load in self.loads:
            self.assertGreater(self.of(load)["consistent_hash"]["load_max_over_mean"], 1.25, load)


if __name__ == "__main__":
    unittest.main()
