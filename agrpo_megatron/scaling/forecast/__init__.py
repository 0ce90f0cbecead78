"""What a run will take, from its settings: FLOPs, seconds and bytes on disk.

Every figure is an upper bound of its kind: each completion runs all its denoising steps, has an
advantage, and is not sampled again. Rewards, saves and start-up are not included.
"""
