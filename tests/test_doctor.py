import subprocess
import sys

from qirl import doctor


def test_every_part_has_a_state_and_says_what_it_costs():
    rows = doctor.report()
    parts = [row.part for row in rows]
    wanted = [
        "torch",
        "CUDA",
        "Triton",
        "csrc, CPU",
        "csrc, CUDA",
        "Transformer Engine",
        "flash-attn",
        "apex",
        "DALI",
    ]
    assert [part for part in wanted if part not in parts] == []
    assert all(row.state and row.cost for row in rows)
    assert rows[0].usable


def test_a_probe_that_breaks_is_a_row_and_not_a_crash():
    def broken():
        raise RuntimeError("libcudnn.so.9: cannot open shared object file\nmore")

    assert doctor._state(broken) == (
        False,
        "broken: RuntimeError: libcudnn.so.9: cannot open shared object file",
    )


def test_the_report_is_printed_and_exits_with_0():
    code = "from qirl.doctor import print_report; print_report()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Transformer Engine" in done.stdout and "without it" in done.stdout


def test_optional_packages_are_looked_up_without_importing_them():
    code = "import sys; from qirl.doctor import report; report()\nprint({'peft', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
