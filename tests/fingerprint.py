"""Hash the models that small training runs end with, for changes that must not change a number.

    OMP_NUM_THREADS=1 python tests/fingerprint.py > before.txt           before the change
    OMP_NUM_THREADS=1 python tests/fingerprint.py | diff before.txt -    after it

Six runs of eight steps per iteration on the miniature world, about a minute on two idle cores. One
of them is killed in its second iteration and started again. Hashes depend on the processor and on
torch's version, so none is committed.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SHORT = "--steps 8 --iterations 2 --score none --device cpu"
VARIED = f"{SHORT} --micro-batch 5 --prompt-dropout 0.3 --flip 0.5 --grid-prompts 0"
RUNS = {
    "all": SHORT,
    "spin": f"{VARIED} --loss spin",
    "spin-killed": f"{VARIED} --loss spin --save-every 3",
    "spin-independent-noise": f"{VARIED} --loss spin --noise independent",
    "spin-bounded": f"{VARIED} --loss spin-bounded",
    "sft": f"{VARIED} --loss sft",
    "dpo": f"{VARIED} --loss dpo",
}
KILL_AFTER = 12  # log lines: in the second iteration, past a saved state


def hash_weights(path: Path) -> str:
    """Return SHA-256 over the names, shapes, dtypes and bytes of a .safetensors file's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(flags: str, out: Path, kill_after: int | None = None) -> None:
    """Run train.py; with `kill_after`, kill it when its log has that many lines."""
    command = [sys.executable, "train.py", *flags.split(), "--out", str(out)]
    with open(out.with_suffix(".txt"), "a") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        log = out / "log.jsonl"
        while kill_after and process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) >= kill_after:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        process.wait()
    if not kill_after and process.returncode:
        sys.exit(f"{' '.join(command)} failed: see {out.with_suffix('.txt')}")


def fingerprint(name: str, folder: Path) -> list[str]:
    """Run one of RUNS and return a line for each model: run, model, hash."""
    out = folder / name
    if name == "spin-killed":
        train(RUNS[name], out, KILL_AFTER)
        lines = (out / "log.jsonl").read_text().splitlines()
        if (out / "iter2" / "checkpoint").exists():
            sys.exit("the run ended before it was killed")
        assert json.loads(lines[-1])["iteration"] == 2
    train(RUNS[name], out)
    models = sorted(out.glob("*/checkpoint/unet/diffusion_pytorch_model.safetensors"))
    return [f"{name}  {path.parts[-4]}  {hash_weights(path)}" for path in models]


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="fingerprint-"))
    print(f"runs are in {folder}", file=sys.stderr)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for lines in pool.map(lambda name: fingerprint(name, folder), RUNS):
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
