"""What a run will take, from its settings: FLOPs, seconds and bytes on disk.

FLOPs are those of completions that run all their denoising steps, have an advantage, and are not
sampled again: a run takes less where texts end early or rewards are equal, and more where
`algorithm.resample_rounds` samples other problems or `mc_samples=auto` chooses more draws. Seconds
are FLOPs over an assumed speed. Rewards, saves and start-up are not included.
"""
