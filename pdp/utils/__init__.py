"""Functions around LoRA models, under the path that the guide gives them."""
