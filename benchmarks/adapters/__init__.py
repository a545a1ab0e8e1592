"""CP adapters beside PEFT's other adapters: what a layer costs, and two fine-tunings.

python -m benchmarks.adapters layers      FLOPs, kept bytes and times of one adapted layer
python -m benchmarks.adapters reviews     a sentence encoder fine-tuned on film reviews
python -m benchmarks.adapters messages    a language model fine-tuned on short messages
python -m benchmarks.adapters page        docs/adapters.md from the stored records
"""
