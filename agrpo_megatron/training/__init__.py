"""The loops: supervised fine-tuning, rollouts, policy-gradient updates, evaluation."""
