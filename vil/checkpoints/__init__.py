"""Weights and runs on disk.

`open.open_weights` reads any file of weights, `training_state.read_training_state` the checkpoint from which
a run continues. `training_state.write_training_state` and `safetensors_file.write_safetensors` write.
"""
