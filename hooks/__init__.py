"""Hook adapters: find the MoE layers of a Hugging Face model, read them bit-exactly, and check that the reading is true."""
