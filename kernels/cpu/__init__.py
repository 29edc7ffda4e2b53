"""The operations of a decoder in C++, for CPUs: weights and caches as they are stored, sums in float32."""
