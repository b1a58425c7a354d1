"""Conversations: the tuned models' chat template for them, a plain rendering for the bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Chat", "PlainChat", "chat_prompts", "plain_chat"]

Chat: TypeAlias = "Sequence[Mapping[str, str]]"
PlainChat: TypeAlias = "Callable[[Chat], str]"


def plain_chat(messages: Chat) -> str:
    """A conversation as text that a base model continues: system text, then a line a turn.

    Args:
        messages: mappings with `role` ("system", "user" or "assistant") and `content`.
    """
    lines = []
    for message in messages:
        role, content = message["role"], message["content"]
        lines.append(content if role == "system" else f"{role.title()}: {content}")
    return "\n".join([*lines, "Assistant:"])


def chat_prompts(
    chat: Chat | Sequence[Chat], tokenizer: Any, chat_tokenizer: Any, plain: PlainChat
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts of one conversation or of a batch of them, padded on the left.

    Args:
        tokenizer: of the base models.
        chat_tokenizer: of the tuned models; its chat template is used.
        plain: renders a conversation for the bases.

    Returns:
        Ids and mask for the bases, int64 [batch, width] each, and ids and mask for the tuned models.

    Raises:
        ValueError: without a tokenizer or a chat template, and for what is not a list of messages.
    """
    if tokenizer is None:
        raise ValueError("chat needs a tokenizer: give EFTModels tokenizer=")
    if not getattr(chat_tokenizer, "chat_template", None):
        raise ValueError(
            "chat needs a chat template, and the tuned models' tokenizer has none: set models.chat_tokenizer "
            "(EFTModels' chat_tokenizer=) to their tokenizer with chat_template set"
        )
    if not isinstance(chat, Sequence):
        _check(chat)
    chats: Any = [chat] if chat and isinstance(chat[0], Mapping) else chat
    for messages in chats:
        _check(messages)
    if not chats:
        raise ValueError("chat is empty; give at least one message")
    texts = [plain(messages) for messages in chats]
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"chat_rendering must give text of at least one character, got {text!r}")
    base_ids = [tokenizer(text).input_ids for text in texts]
    tuned_ids = [
        chat_tokenizer(
            chat_tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        ).input_ids
        for messages in chats
    ]
    return *_left_padded(base_ids, tokenizer), *_left_padded(tuned_ids, chat_tokenizer)


def _check(messages: Any) -> None:
    good = isinstance(messages, Sequence) and len(messages) > 0
    if not good or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError(
            'chat must be a list of messages {"role": ..., "content": ...} of text, or a batch of such lists'
        )


def _left_padded(rows: Sequence[Sequence[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
