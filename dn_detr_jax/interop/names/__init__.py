"""The names of official PyTorch state dicts, a module for each variant and one for backbones."""
