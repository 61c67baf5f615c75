from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from common import distributed

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """The report of each of two gloo processes, started as a launcher would."""
    folder = tmp_path_factory.mktemp("two_ranks")
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.common.two_ranks", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.slow
class TestTwoRanks:
    def test_ranks_know_rank_and_world_size(self, ranks):
        assert [(r["rank"], r["world"], r["is_main"]) for r in ranks] == [
            (0, 2, True),
            (1, 2, False),
        ]
        assert [r["from_main"] for r in ranks] == ["rank 0", "rank 0"]

    def test_any_is_over_rows_and_ranks(self, ranks):
        assert [r["any"] for r in ranks] == [[True, False]] * 2

    def test_every_rank_has_equally_many_batches(self, ranks):
        assert [r["batches"] for r in ranks] == [[[0, 2], [4]], [[1, 3], []]]

    def test_error_on_a_rank_is_raised_on_all(self, ranks):
        assert [r["together"] for r in ranks] == ["on rank 1: 'lost'", "lost"]

    def test_rows_are_gathered_in_rank_order(self, ranks):
        expected = [[0.0, 2.0], [1.0, 3.0], [10.0, 12.0], [11.0, 13.0]]
        assert [r["gathered"] for r in ranks] == [expected, expected]

    def test_unequal_rows_raise_on_both(self, ranks):
        assert all("(1, 2)" in r["unequal"] and "(2, 2)" in r["unequal"] for r in ranks)

    def test_means_divide_by_the_ranks_that_have_a_value(self, ranks):
        assert [r["mean"] for r in ranks] == [
            {"loss": 1.5, "reward": 4.0, "late": 5.0}
        ] * 2

    def test_maximum_and_sum(self, ranks):
        assert [r["max"] for r in ranks] == [-2.0, -2.0]
        assert all(r["max_nan_is_nan"] for r in ranks)
        assert [r["sum"] for r in ranks] == [pytest.approx(0.3), pytest.approx(0.3)]

    def test_checkpoint_has_the_files_of_both_ranks(self, ranks):
        assert [r["found"] for r in ranks] == ["step-000005", "step-000005"]
        assert [r["weights"] for r in ranks] == [[0.0] * 3, [1.0] * 3]

    def test_failing_rank_stops_both_and_keeps_checkpoints(self, ranks):
        assert "rank 1" in ranks[0]["failure"]
        assert ranks[1]["failure"].startswith("OSError:")
        assert [r["after_failure"] for r in ranks] == ["step-000005", "step-000005"]


class TestAlone:
    def test_collectives_are_identities(self):
        x = torch.randn(2, 3)
        assert distributed.gather_rows(x) is x
        assert distributed.mean_over_ranks({"a": 2}) == {"a": 2.0}
        assert distributed.max_over_ranks(3.0) == distributed.sum_over_ranks(3.0) == 3.0
        assert (
            distributed.rank(),
            distributed.world_size(),
            distributed.is_main(),
        ) == (0, 1, True)
        distributed.barrier()

    @pytest.mark.slow
    def test_deepspeed_starts_in_a_plain_process_and_compiles_nothing(self, tmp_path):
        program = (
            "from common import distributed as d; d.init_process_group(); d.init_process_group()\n"
            "import deepspeed, torch\n"
            "m = torch.nn.Linear(2, 1, bias=False)\n"
            "torch.nn.init.ones_(m.weight)\n"
            "o = torch.optim.SGD(m.parameters(), lr=0.5)\n"
            "c = {'train_micro_batch_size_per_gpu': 1, 'zero_optimization': {'stage': 1},"
            " 'gradient_clipping': 0.0, 'zero_allow_untested_optimizer': True}\n"
            "e, *_ = deepspeed.initialize(model=m, optimizer=o, config=c)\n"
            "e.backward(e(torch.tensor([[1.0, 2.0]])).sum()); e.step()\n"
            "print('weights', m.weight.tolist(), d.world_size()); d.shutdown()\n"
        )
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        env |= {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=env,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "weights [[0.5, 0.0]] 1" in done.stdout  # 1 - 0.5 * (1, 2)
        assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        pytest.param("", 0, marks=pytest.mark.long),
        pytest.param("sys.exit(2)", 2, marks=pytest.mark.long),
        ("raise ValueError", 1),
    ],
)
def test_process_ends_with_its_exit_code(tmp_path, ending, code):
    """The exit waits for the collective threads; otherwise about half of the exits are 134."""
    program = (
        "import os, sys; import torch, torch.distributed as dist\n"
        "from common import distributed as d\n"
        "rank, codes = int(sys.argv[1]), []\n"
        "for i in range(8):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        store = dist.FileStore(f'{sys.argv[2]}/{i}', 2)\n"
        "        dist.init_process_group('gloo', store=store, rank=rank, world_size=2)\n"
        "        sys.kept = dist.group.WORLD  # as deepspeed does\n"
        "        sys.setswitchinterval(5)  # no switch before the main thread waits\n"
        "        try:\n"
        "            with d.joined():\n"
        "                for _ in range(50): d.barrier()\n"
        f"                {ending}\n"
        "        except ValueError: sys.exit(1)\n"
        "        sys.exit()\n"
        "    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "print(codes)\n"
    )
    words = [[sys.executable, "-c", program, rank, str(tmp_path)] for rank in "01"]
    ranks = [
        subprocess.Popen(
            w,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for w in words
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [
        str([code] * 8)
    ] * 2


def test_exit_waits_for_working_threads_only() -> None:
    ended, never = [], threading.Event()

    def work() -> None:
        hashlib.sha256(bytes(200_000_000))  # without the interpreter's lock
        ended.append(time.monotonic())

    threading.Thread(target=never.wait, daemon=True).start()
    threading.Thread(target=work).start()
    distributed._let_threads_finish()
    assert 0.0 < time.monotonic() - ended[0] < 5.0  # patience is 10
    never.set()


class TestSeeds:
    def test_seed_is_the_head_of_a_sha256(self):
        digest = hashlib.sha256(b"int:2:42;int:1:3;str:5:noise;").hexdigest()
        assert distributed.derive_seed(42, 3, "noise") == int(digest[:16], 16) // 2
        assert (
            distributed.derive_seed() == int("e3b0c44298fc1c14", 16) // 2
        )  # SHA-256 of nothing, FIPS 180-4

    def test_seeds_do_not_collide_over_types_and_borders(self):
        parts = [
            (1, 23),
            (12, 3),
            (123,),
            ("1", 23),
            ("1;", 23),
            (1, 2, 3),
            (-1, 23),
            ("a", "bc"),
            ("ab", "c"),
        ]
        seeds = {distributed.derive_seed(*p) for p in parts}
        assert len(seeds) == len(parts)
        assert all(0 <= seed < 2**63 for seed in seeds)

    @pytest.mark.parametrize("part", [1.0, True, None])
    def test_other_types_are_refused(self, part):
        with pytest.raises(TypeError, match="seed"):
            distributed.derive_seed(part)

    def test_generators_repeat_and_differ(self):
        def draw(*parts) -> torch.Tensor:
            return torch.randn(1000, generator=distributed.seeded_generator(*parts))

        assert torch.equal(draw(7, "noise"), draw(7, "noise"))
        # independent draws: correlation of 1,000 pairs has deviation 0.03
        assert abs((draw(7, "noise") * draw(8, "noise")).mean().item()) < 0.15
