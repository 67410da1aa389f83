"""The small routes: /v1/embeddings, /tokenize, /detokenize, /v1/load_lora_adapter, /v1/unload_lora_adapter."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence

from lilliput.base.errors import UserError
from lilliput.serve.openai import prompts
from lilliput.serve.openai.errors import ApiError, from_user_error
from lilliput.serve.openai.protocol import DetokenizeRequest, EmbeddingRequest, Json, LoadAdapterRequest, TokenizeRequest, UnloadAdapterRequest
from lilliput.serve.openai.served import Served

MOST_TEXTS = 2048  # as at OpenAI


async def embeddings(served: Served, body: EmbeddingRequest) -> Json:
    """A vector for each text. ApiError where embeddings are off."""
    if served.adapter_of(body.model):
        raise ApiError(f"embeddings are of `{served.name}` itself: its second copy of the weights carries no adapter", "model")
    if served.embedder is None:
        raise ApiError("embeddings are off on this server; start it with http.embeddings=mean", "model")
    texts: Sequence[str | list[int]] = [body.input] if isinstance(body.input, str) else body.input  # type: ignore[assignment]
    if texts and isinstance(texts[0], int):
        texts = [texts]  # type: ignore[list-item]
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise ApiError(f"input holds {len(texts)} texts, 1 to {MOST_TEXTS} are taken", "input")
    ids = [await served.encode(text, True, "input") if isinstance(text, str) else text for text in texts]
    if body.dimensions is not None and body.dimensions > served.embedder.dim:
        raise ApiError(f"vectors have {served.embedder.dim} numbers, {body.dimensions} were asked for", "dimensions")
    served.admit()
    served.open += 1
    try:
        served.embedder.check(ids)
        vectors = await asyncio.to_thread(served.embedder.embed, ids)
    except UserError as error:
        raise from_user_error(error, "input") from error
    finally:
        served.open -= 1
    if body.dimensions is not None:
        vectors = [_shortened(vector, body.dimensions) for vector in vectors]
    count = sum(map(len, ids))
    shown = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() if body.encoding_format == "base64" else v for v in vectors]
    data = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(shown)]
    return {"object": "list", "data": data, "model": served.name, "usage": {"prompt_tokens": count, "total_tokens": count}}


def _shortened(vector: list[float], dim: int) -> list[float]:
    """The first numbers, of length 1 again."""
    part = vector[:dim]
    length = sum(value * value for value in part) ** 0.5 or 1.0
    return [value / length for value in part]


async def tokenize(served: Served, body: TokenizeRequest) -> Json:
    """The ids of a text or of a chat."""
    served.adapter_of(body.model)
    if body.prompt is not None:
        ids = await served.encode(body.prompt, body.add_special_tokens, "prompt")
    else:
        ids = (await prompts.of_chat(served, [message.plain() for message in body.messages or ()], ())).ids
    context = served.embedder.context if served.engine is None and served.embedder is not None else served.generator.engine.context
    spelled = [served.spelled(number)[0] for number in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": spelled}


async def detokenize(served: Served, body: DetokenizeRequest) -> Json:
    """The text of ids."""
    served.adapter_of(body.model)
    try:
        if strangers := [number for number in body.tokens if not 0 <= number < served.tokenizer.vocab_size]:
            raise ApiError(f"token id {strangers[0]} is not in the vocabulary of {served.tokenizer.vocab_size}", "tokens")
        return {"prompt": served.tokenizer.decode(body.tokens, skip_special=False)}
    except UserError as error:
        raise from_user_error(error, "tokens") from error


async def load_adapter(served: Served, body: LoadAdapterRequest) -> str:
    """Load an adapter from the server's folder of adapters; requests name it as their `model`. ApiError where that is off or it does not fit."""
    if served.library is None:
        raise ApiError("adapters are off on this server; start it with serve.adapters=FOLDER", status=403)
    if body.lora_name == served.name or (body.lora_name in served.adapters and not body.load_inplace):
        raise ApiError(f"`{body.lora_name}` is loaded already; load_inplace replaces an adapter", "lora_name")
    try:
        place = served.library.place(body.lora_path)
        await served.generator.load(body.lora_name, place, replace=body.load_inplace)
    except UserError as error:
        refusal = from_user_error(error, "lora_path")
        refusal.message = refusal.message.replace(str(served.library.folder), ".")  # clients know the folder's inside alone
        raise refusal from error
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


async def unload_adapter(served: Served, body: UnloadAdapterRequest) -> str:
    """Take no more requests for an adapter; those that run end with it. ApiError where it is not loaded."""
    if served.library is None:
        raise ApiError("adapters are off on this server; start it with serve.adapters=FOLDER", status=403)
    if body.lora_name not in served.adapters:
        raise ApiError(f"no adapter is named `{body.lora_name}`", "lora_name", 404)
    await served.generator.unload(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
