"""Every kernel of kvarn, declared once.

(to be completed: see the contract in this docstring)

    kvarn::paged_attention(Tensor query, Tensor kv, Tensor slot_positions, Tensor block_tables, Tensor kv_slots,
                           Tensor query_starts, Tensor positions, float scale, int window=0, float softcap=0.0,
                           Tensor? sinks=None) -> Tensor
        query          [T, Hq, D]   float32 or bfloat16, rows of all sequences one after another
        kv             [N, 2, Hkv, B, D]  one layer's view of the pool (dim 0 strided: page-major pool)
        slot_positions [N, B] int32  position of the token held by each slot, -1 when empty
        block_tables   [S, M] int32  block ids of each sequence, in slot order (unused entries: any value)
        kv_slots       [S] int32     how many leading slots of its block table each sequence may look at
        query_starts   [S+1] int32   rows query_starts[s]:query_starts[s+1] belong to sequence s
        positions      [T] int32     position of each query row
        A row at position p of sequence s attends to every slot among the first kv_slots[s] whose position q has
        0 <= q <= p and (window == 0 or p - q < window). Rows that may look at nothing give zeros.
        softcap > 0: logits = softcap * tanh(logits / softcap). sinks [Hq]: an extra logit a head in the softmax's
        denominator (GPT-OSS).
    kvarn::rms_norm(Tensor x, Tensor weight, float eps) -> Tensor
    kvarn::add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor      residual += x, then norm of it
    kvarn::rope_and_cache(Tensor(a!) query, Tensor key, Tensor value, Tensor cos_sin, Tensor positions,
                          Tensor(b!) kv, Tensor slots) -> ()
        rotates query in place (half-split "neox" layout, rotary width = cos_sin.shape[1] <= D), writes the rotated key
        and the value to flat slots [T] (= block * B + offset). cos_sin [P, R] float32: cos in the first half, sin in
        the second.
    kvarn::write_cache(Tensor key, Tensor value, Tensor(a!) kv, Tensor slots) -> ()
    kvarn::silu_mul(Tensor gate_up) -> Tensor         [T, 2F] -> [T, F]
"""
