"""A page to try a mapping or a merge: `python demo.py --checkpoint C`, `python demo.py --models A B MERGED`"""

from common.errors import exit_with_message
from common.flags import parse_flags
from common.optional import require


def main() -> None:
    from mindmerger.flags import DemoFlags

    flags = parse_flags(DemoFlags)
    require("gradio", "requirements-demo.txt")
    from mindmerger.demo import serve

    serve(flags)


if __name__ == "__main__":
    exit_with_message(main)
