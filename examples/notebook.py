# %% [markdown]
# # AGRPO with a model of your own, in a notebook
#
# No Megatron, no settings file, no process group: a torch module that maps ids to logits, a reward,
# and a loop. Here the module is a tiny BERT of transformers with random weights, and the reward
# is the share of tokens that count in order. Half a minute on a CPU.

# %%
import torch
from transformers import BertConfig, BertForMaskedLM

from agrpo_megatron.diffusion import SamplingSettings, module_context, sample
from agrpo_megatron.estimators import AlgorithmSettings, make_rollout, update_losses

DIGITS, MASK, LENGTH = 5, 5, 8  # ids 0 to 4, the mask token, tokens of a completion
PROMPTS, GROUP, UPDATES = 4, 16, 40

torch.manual_seed(0)
config = BertConfig(
    vocab_size=DIGITS + 1,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=32,
    initializer_range=0.1,
)
model = BertForMaskedLM(config).eval()  # eval: dropout would change logits from pass to pass


def reward(completion: torch.Tensor) -> float:
    """Return the share of tokens that count in order: 1 for 0 1 2 3 4 0 1 2."""
    return float((completion == torch.arange(LENGTH) % DIGITS).float().mean())


# %% [markdown]
# ## The method
#
# A context says what the sampler needs of the module. `sample` records every denoising step, so
# `update_losses` can draw some of them, rebuild their states, and score their tokens.

# %%
sampling = SamplingSettings(completion_length=LENGTH, block_length=LENGTH, denoising_steps=4)
algorithm = AlgorithmSettings(group_size=GROUP, mc_samples=2)
context = module_context(model, mask_id=MASK)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
history = []  # mean reward, and the distance of the policy ratio from 1

for number in range(UPDATES):
    starts = torch.randint(DIGITS, (PROMPTS, 3))
    prompts = [start for start in starts for _ in range(GROUP)]  # a group shares its prompt
    ids = torch.arange(len(prompts)) + number * len(prompts)  # no id twice: ids seed the noise
    trajectory = sample(prompts, ids, context=context, sampling=sampling)
    rewards = torch.tensor([reward(tokens) for tokens in trajectory.tokens])
    rollout, error = make_rollout(trajectory, rewards, algorithm), 0.0
    optimizer.zero_grad()
    for part in update_losses(rollout, algorithm, context=context):
        part.loss.backward()
        error = max(error, float(part.metrics["ratio_max_error"]))
    optimizer.step()
    history.append((float(rewards.mean()), error))
    if number % 10 == 0:
        print(f"update {number:3}  reward {history[-1][0]:.2f}  ratio error {error:.1e}")
