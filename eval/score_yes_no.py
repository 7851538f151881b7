"""Scores candidates by a model's log-odds of yes against no; the same as `recllm score yes-no`.

python eval/score_yes_no.py INSTRUCTIONS --run runs/NAME
python eval/score_yes_no.py INSTRUCTIONS --model Qwen/Qwen2-VL-7B-Instruct --quantization nf4
accelerate launch eval/score_yes_no.py INSTRUCTIONS --run runs/NAME --visual-store auto
accelerate launch --config_file recipes/launch/ddp.yaml eval/score_yes_no.py INSTRUCTIONS --run runs/NAME
accelerate launch --config_file recipes/launch/cpu2.yaml eval/score_yes_no.py INSTRUCTIONS --model tiny
"""

from recllm.config import run_command
from recllm.mllm.scoring.command import score_yes_no
from recllm.mllm.scoring.options import YesNoOptions

if __name__ == "__main__":
    run_command(YesNoOptions, score_yes_no, prog="score_yes_no.py")
