"""The code that asks the tuned LLM, without fedproxy."""

from pathlib import Path

from fedproxy.foreign import plain
from fedproxy.records import Results

_NO_PROMPT = "YOUR PROMPT"


def use_it(results: Results, run: Path) -> str:
    """Python that puts the run's adapter on the LLM with PEFT and lets it answer; empty where either is not known.

    The prompt is that of a row, as training rendered it, where the run noted one.

    Args:
        results: The run.
        run: Its directory.
    """
    if not results.llm.path or not (run / "fused").is_dir():
        return ""
    prompt, llm, adapter = results.prompt, repr(results.llm.path), repr(str(run / "fused"))
    text, special = (
        (prompt.text, "" if prompt.special else ", add_special_tokens=False") if prompt else (_NO_PROMPT, "")
    )
    known = f"  # the row's own: {prompt.answer!r}" if prompt and prompt.answer else ""
    trusted = ", trust_remote_code=True" * bool(results.setting("llm", "trust_remote_code"))
    return plain(
        f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({llm}{trusted})
model = AutoModelForCausalLM.from_pretrained({llm}{trusted})
model = PeftModel.from_pretrained(model, {adapter})
prompt = tokenizer({text!r}, return_tensors="pt"{special})
answer = model.generate(**prompt, max_new_tokens=64)[0, prompt.input_ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True)){known}""",
        lines=True,
    )
