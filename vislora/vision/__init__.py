"""What train_scripts/classification.py and eval/forgetting.py share: image towers, labelled images, heads, scores."""
