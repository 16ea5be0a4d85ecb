"""What images of a subject are worth: fidelity, prompt fidelity, diversity, and what the base model forgot.

`pictures` and `transforms` turn files into tensors; `backbones`, `perceptual` and `features` into numbers a picture or
pair, kept by `cache`; `protocols` names what the papers do with them, `cells` reduces, `score` ties the two together.
`subjects` reads data, `draw` makes images, `drift` compares a model with its base.
"""
