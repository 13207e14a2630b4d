#!/usr/bin/env bash
# A function that is passed to `apply_chat_template` as a template variable arrives as text: calling it in the template
# raises "'str' object is not callable". Templates that call `strftime_now`, as Llama 3.2's, therefore cannot be given
# another clock this way, and their prompts change with the date. A macro of the same name in front of the template works.
#
# Seen with transformers 5.23.0, jinja2 3.1.6, tokenizers 0.23.0:
#   function  'str' object is not callable
#   macro     26 Jul 2024
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
cat > "$work/template.py" <<'EOF'
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
template = "{{ strftime_now('%d %b %Y') }}"
turns = [{"role": "user", "content": "a"}]


def rendered(template: str, **variables: object) -> str:
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **variables)
    except Exception as error:
        return str(error)


function = rendered(template, strftime_now=lambda form: "26 Jul 2024")
macro = rendered("{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}" + template)
print(f"function: {function}\nmacro: {macro}")
sys.exit(not ("not callable" in function and macro == "26 Jul 2024"))
EOF
"$work/venv/bin/python" "$work/template.py" 2>/dev/null || { echo "the behaviour has changed"; exit 1; }
