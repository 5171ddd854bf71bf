"""How artifacts look outside: PEFT folders, safetensors files, live models and state dicts. A reader
turns one of them into a `Source`, which is all that a push sees; a writer goes the other way."""
