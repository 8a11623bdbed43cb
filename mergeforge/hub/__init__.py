"""Download models from the Hugging Face Hub and publish folders to it."""
