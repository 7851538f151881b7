"""Rewards for texts that a model writes about items: keywords (MMSRARec, stage 1) and summaries.

Every part is a function or an object that takes answers and returns a number in [0, 1] for each, or None
where it does not apply. `recllm.training.rewards.table` has them by name; nothing here needs TRL.
"""

from recllm.training.rewards.answers import Answer, Source
from recllm.training.rewards.table import Rewards, RewardSettings, make_rewards, total

__all__ = ["Answer", "RewardSettings", "Rewards", "Source", "make_rewards", "total"]
