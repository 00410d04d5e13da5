"""Scripts in processes of their own, which know nothing of what the tests have imported and set."""

import json
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import sae_lens_flex

SECONDS = 300

# It forks for each line: script, arguments, environment, paths for what is printed and for errors.
SERVER = f"""
import json, os, signal, sys, traceback
import sae_lens

assert not any(name.split(".")[0] == "sae_lens_flex" for name in sys.modules)
for line in sys.stdin:
    script, arguments, environment, *outputs = json.loads(line)
    process = os.fork()
    if process == 0:
        signal.alarm({SECONDS})
        for descriptor, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ.update(environment)
        sys.argv[1:] = arguments
        code = 1
        try:
            exec(compile(script, "script", "exec"), {{"__name__": "__main__"}})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitpid(process, 0)[1], flush=True)
"""


def environment_of_a_user() -> dict[str, str]:
    """Return this process's environment, in which Triton's interpreter is off."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package_parent = str(Path(sae_lens_flex.__file__).parents[1])
    path = [package_parent, *filter(None, [inherited.get("PYTHONPATH")])]
    return inherited | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def run_python(script: str, *args: str | Path, **environment: str) -> str:
    """Run a script where SAELens is imported and this package is not. Return what it printed.

    The environment is a user's, and what is given beside it. The process is a fork of one that has
    imported SAELens, which takes seconds. What SAELens reads of the environment it has read then.
    """
    assert not any(name.startswith("HF_") for name in environment), "use run_new_python"
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as directory:
        printed, errors = Path(directory, "stdout"), Path(directory, "stderr")
        outputs = [str(printed), str(errors)]
        request = [textwrap.dedent(script), [*map(str, args)], environment, *outputs]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status == "0\n", errors.read_text()
        return printed.read_text()


def run_new_python(script: str, *args: str | Path, **environment: str) -> str:
    """Run a script in an interpreter that has imported nothing. Return what it printed.

    The environment is a user's, and what is given beside it.
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=environment_of_a_user() | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@cache
def _server() -> subprocess.Popen[str]:
    """Start the process that forks. It ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment_of_a_user(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
