"""Special tokens that a diffusion model cannot do without."""

from transformers import PreTrainedTokenizerBase

from dllm.utils.parsing import InputError


def token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """Id of the special token `name` ("mask_token", "pad_token", ...).

    Raises:
        InputError: the tokenizer has none.
    """
    token = tokenizer.special_tokens_map.get(name)
    if token is None:
        raise InputError(
            f"the tokenizer has no {name.replace('_', ' ')}: load it with dllm.utils.get_tokenizer "
            f"or set tokenizer.{name}"
        )
    found = tokenizer.convert_tokens_to_ids(str(token))
    assert isinstance(found, int)
    return found
