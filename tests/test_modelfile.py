"""The Modelfile: Ollama's grammar, and its template rendered by Go's own text/template."""

import json
import re
import shutil
import subprocess

import pytest
from test_chat import MISTRAL, tuned

from finetune.modelfile import go_template, write_modelfile
from finetune.template import chat_template

# What Ollama does with a chat: https://github.com/ollama/ollama/blob/main/template/template.go
GO = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var told struct {
		Template string
		Talks    [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&told); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(told.Template))
	for _, talk := range told.Talks {
		if err := parsed.Execute(os.Stdout, map[string]any{"Messages": talk}); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("\\x00")
	}
}
"""
USER = {"role": "user", "content": 'Say "hi" {{ .Content }}\n ### End'}
ANSWER = {"role": "assistant", "content": " Hi.\n\nBye "}
TALKS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [{"role": "system", "content": ""}, USER],
    [USER, ANSWER, USER, ANSWER, {"role": "user", "content": "And?"}],
    [{"role": "system", "content": "s"}, USER, ANSWER, USER],
    [USER, ANSWER],
    [USER, {"role": "system", "content": "Be brief from now on."}],
]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="no Go here")
def test_gos_rendering_is_the_chat_templates(tokenizer, tmp_path):
    (tmp_path / "main.go").write_text(GO)
    own, told = chat_template(tokenizer), {"Template": go_template(tokenizer), "Talks": TALKS}
    command = ["go", "run", str(tmp_path / "main.go")]
    done = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bos = tokenizer.bos_token if "bos_token" in own else ""
    render = {"chat_template": own, "tokenize": False, "add_generation_prompt": True}
    wanted = [tokenizer.apply_chat_template(talk, **render) for talk in TALKS]
    assert all(text.startswith(bos) for text in wanted)
    assert done.stdout.split("\x00")[:-1] == [text.removeprefix(bos) for text in wanted]
    assert len(set(wanted)) == len(TALKS) - 1  # an empty system text is none


def parsed(text):
    """A Modelfile's commands by Ollama's grammar: a name, and a value that may be quoted."""
    value = r'(?:"""(?P<long>.*?)"""|"(?P<short>[^"]*)"|(?P<plain>\S[^\n]*))'
    found = re.compile(rf"(?P<name>FROM|ADAPTER|TEMPLATE|PARAMETER \w+) {value}\n", re.S)
    place, commands = 0, []
    while place < len(text):
        one = found.match(text, place)
        assert one, text[place : place + 80]
        commands.append((one["name"], one["long"] or one["short"] or one["plain"]))
        place = one.end()
    return dict(commands)


def test_a_modelfile_says_what_to_load_how_to_ask_and_where_to_stop(tokenizer, tmp_path):
    write_modelfile(tmp_path / "Modelfile", tokenizer, 8448, "./merged-f16.gguf")
    told = parsed((tmp_path / "Modelfile").read_text())
    assert told["FROM"] == "./merged-f16.gguf" and "ADAPTER" not in told
    assert told["TEMPLATE"] == go_template(tokenizer)
    assert told["PARAMETER stop"] == "\n\n### End" and told["PARAMETER temperature"] == "0"
    assert told["PARAMETER num_ctx"] == "8448"  # Ollama's own would be 4096 or less
    write_modelfile(tmp_path / "Modelfile", tokenizer, 8448, "../b.gguf", "./a.gguf")
    told = parsed((tmp_path / "Modelfile").read_text())
    assert (told["FROM"], told["ADAPTER"]) == ("../b.gguf", "./a.gguf")


def test_no_modelfile_is_written_for_a_base_models_own_template(mistral_tokenizer, tmp_path):
    write_modelfile(tmp_path / "Modelfile", tuned(mistral_tokenizer, MISTRAL), 9, "./m.gguf")
    assert not (tmp_path / "Modelfile").exists()
