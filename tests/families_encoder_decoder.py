"""Tiny encoder-decoder models; wherever the family allows, the two sides differ in depth, heads and width."""

from __future__ import annotations

from family import COMMON, LLAMA, VOCAB, WINDOW, Family

BART = dict(
    COMMON,
    d_model=64,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=2,
    encoder_ffn_dim=96,
    decoder_ffn_dim=80,
    max_position_embeddings=256,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    tie_word_embeddings=False,  # tied random ones repeat one token for ever, so that generated tokens test nothing
)
BART_ODD = dict(BART, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=4)
PEGASUS = {key: value for key, value in {**BART_ODD, "decoder_start_token_id": 0}.items() if key != "bos_token_id"}
T5 = dict(
    vocab_size=VOCAB,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
    d_model=64,
    d_kv=24,
    d_ff=96,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    dropout_rate=0.0,
    tie_word_embeddings=False,  # tied ones scale logits by d_model ** -0.5, to a standard deviation of 0.08
)
T5GEMMA = dict(
    LLAMA,
    head_dim=16,
    query_pre_attn_scalar=16,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)
BERT = dict(
    COMMON,
    model_type="bert",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
BERT_ENCODER = dict(BERT, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
GPT2 = dict(COMMON, model_type="gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256, **NO_DROPOUT)
PAIR = dict(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)


ENCODER_DECODERS: dict[str, Family] = {
    "bart": Family("BartConfig", "BartForConditionalGeneration", BART),
    "mbart": Family("MBartConfig", "MBartForConditionalGeneration", BART_ODD),
    "pegasus": Family("PegasusConfig", "PegasusForConditionalGeneration", PEGASUS),
    "pegasus_x": Family(
        "PegasusXConfig", "PegasusXForConditionalGeneration", {**PEGASUS, "num_global_tokens": 4, "block_size": 16}
    ),
    "marian": Family("MarianConfig", "MarianMTModel", {**BART, "decoder_start_token_id": 0}),
    "m2m_100": Family("M2M100Config", "M2M100ForConditionalGeneration", BART_ODD),
    "blenderbot": Family(
        "BlenderbotConfig",
        "BlenderbotForConditionalGeneration",
        {**BART_ODD, "decoder_start_token_id": 1, "encoder_no_repeat_ngram_size": 0},
    ),
    "blenderbot_small": Family(
        "BlenderbotSmallConfig", "BlenderbotSmallForConditionalGeneration", {**BART, "decoder_start_token_id": 1}
    ),
    "plbart": Family("PLBartConfig", "PLBartForConditionalGeneration", BART),
    "led": Family(
        "LEDConfig",
        "LEDForConditionalGeneration",
        {
            **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
            "max_encoder_position_embeddings": 256,
            "max_decoder_position_embeddings": 256,
            "attention_window": WINDOW,
        },
    ),
    "t5": Family("T5Config", "T5ForConditionalGeneration", T5, limit=None),
    "mt5": Family("MT5Config", "MT5ForConditionalGeneration", {**T5, "d_kv": 8}, limit=None),
    "umt5": Family("UMT5Config", "UMT5ForConditionalGeneration", T5, limit=None, sdpa_since="5.23"),
    "longt5_local": Family(
        "LongT5Config",
        "LongT5ForConditionalGeneration",
        {**T5, "encoder_attention_type": "local", "local_radius": 4},
        limit=None,
    ),
    "longt5_global": Family(
        "LongT5Config",
        "LongT5ForConditionalGeneration",
        {**T5, "encoder_attention_type": "transient-global", "local_radius": 4, "global_block_size": 8},
        limit=None,
    ),
    "switch_transformers": Family(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            **T5,
            "num_experts": 4,
            "expert_capacity": 64,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "router_jitter_noise": 0.0,
        },
        limit=None,
    ),
    "t5gemma": Family(
        "T5GemmaConfig",
        "T5GemmaForConditionalGeneration",
        dict(
            encoder=dict(
                T5GEMMA,
                hidden_size=48,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_hidden_layers=2,
                layer_types=["sliding_attention", "full_attention"],
            ),
            decoder=T5GEMMA,
            vocab_size=VOCAB,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            dropout_rate=0.0,
        ),
        sliding=True,
        sdpa_since="5.23",
    ),
    "prophetnet": Family(
        "ProphetNetConfig",
        "ProphetNetForConditionalGeneration",
        dict(
            COMMON,
            hidden_size=64,
            num_encoder_layers=3,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=2,
            encoder_ffn_dim=96,
            decoder_ffn_dim=80,
            max_position_embeddings=256,
            num_buckets=8,
            relative_max_distance=20,
            ngram=2,
            decoder_start_token_id=1,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            tie_word_embeddings=False,
        ),
    ),
    "whisper": Family(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
            "decoder_start_token_id": 1,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        limit=64,
    ),
    "bert_bert": Family(
        "EncoderDecoderConfig",
        "EncoderDecoderModel",
        dict(PAIR, encoder=BERT_ENCODER, decoder=dict(BERT, is_decoder=True, add_cross_attention=True)),
    ),
    "bert_gpt2": Family(
        "EncoderDecoderConfig",
        "EncoderDecoderModel",
        dict(PAIR, encoder=BERT_ENCODER, decoder=dict(GPT2, is_decoder=True, add_cross_attention=True)),
    ),
}
