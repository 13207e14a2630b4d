"""MindMerger (Huang et al., NeurIPS 2024, arXiv 2405.17386): a multilingual encoder in front of an LLM.

Order of the data: tasks -> data -> batching -> modeling <- trainer -> checkpoint -> evaluation -> report.
"""
