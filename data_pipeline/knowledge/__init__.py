"""What is known about each label in each modality: notes of our own wording, and retrieval over documents."""
