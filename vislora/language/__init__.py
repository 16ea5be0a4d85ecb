"""What the language scripts share: data, templates, masks, packing, losses, models, generation, scoring."""
