"""MindMerger (Huang et al., NeurIPS 2024, arXiv 2405.17386): a multilingual encoder's understanding for an LLM.

Follow the data: tasks -> data -> batching -> modeling <- trainer -> checkpoint -> evaluation -> report.
"""
