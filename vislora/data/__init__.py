"""Reading what users bring: photos, captions, prompts."""
