"""Real runs on machines with little: of shared memory, of open files, of disk."""

import json
import subprocess
import sys

import pytest

PATIENCE = 300.0
SHORT = ["--epochs", "12st", "--batch-size", "8", "--log-interval", "3st", "--val-interval", "6st"]
SHORT += ["--save-every", "3st"]
pytestmark = pytest.mark.slow


def shell(script: str, *arguments: object, mounts: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script in which "$@" is pdvit with the arguments, by default with `mounts` of its own, or skip the test."""
    unshare = ["unshare", "-m"] if mounts else []
    if mounts and subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs a user that may mount (root), for file systems of its own")
    command = [*unshare, "bash", "-c", script, "bash", sys.executable, "-m", "pdvit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("size", ["64k", "1m", "64m", None])
def test_little_shared_memory_or_few_open_files_are_enough(tmp_path, tiny, image_folder, size):
    limit = f"mount -t tmpfs -o size={size} tmpfs /dev/shm" if size else "ulimit -n 40"
    more = ["--data", image_folder, "--resident", "off", "--workers", "5", "--img-size", "224", "--patch-size", "32"]
    done = shell(f'{limit} && exec "$@"', "train", *tiny, *SHORT, *more, "--out", tmp_path / "run", mounts=bool(size))
    assert done.returncode == 0, done.stderr
    assert "note: " in done.stderr or size == "64m"


def test_a_full_disk_is_a_failure_and_the_run_goes_on_when_there_is_room(tmp_path, tiny):
    """Of a small file system another file takes what is left, to the last byte, while the run trains."""
    run, resume = tmp_path / "run", f"{sys.executable} -m pdvit train --resume {tmp_path}/run"
    script = f"""
mount -t tmpfs -o size=4m tmpfs {tmp_path}
"$@" & trained=$!
until [ -s {run}/checkpoints/last ] || ! kill -0 $trained; do sleep 0.05; done
dd if=/dev/zero of={tmp_path}/filler bs=1k status=none
wait $trained
echo "ended with $?, $(cat {run}/status.json | tr -d '\n')" $(find {run} -name ".[!l]*")
rm {tmp_path}/filler; {resume} && cat {run}/status.json"""
    done = shell(script, "train", *tiny, "--epochs", "300st", *SHORT[2:], "--out", run)
    assert done.returncode == 0, done.stderr
    failed = next(line for line in done.stdout.splitlines() if line.startswith("ended with"))
    assert failed.startswith('ended with 2, {  "status": "failed"')
    assert failed.endswith("}")
    assert json.loads(done.stdout[done.stdout.rindex("\n{") :])["status"] == "finished"
