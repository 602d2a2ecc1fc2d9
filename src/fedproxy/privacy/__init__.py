"""What a federation may tell about rows and about the LLM: how it is bounded, accounted for, and attacked."""
