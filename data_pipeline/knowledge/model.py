"""The project's client of language models as a LangChain chat model.

LangChain's interface is what a lab knows and can exchange: `extract.py` takes any chat model that gives
structured output. The one here sends through `chat.py`, because of what that does and LangChain's clients do
not: one deadline over all tries, a breaker that waits for a lost server, a budget, an answer that is checked
strictly or is an error of a known kind, and answers that a killed job finds again.
"""

from typing import Any

import pydantic
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
from langchain_core.output_parsers import PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable

from fundus_jax.chat import Chat, ChatError


class ServerModel(BaseChatModel):
    """A chat model behind a server, for structured output only.

    Attributes:
        chat: an open client.
        answer_tokens: the longest answer.
    """

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    chat: Chat
    answer_tokens: int = 2048

    @property
    def _llm_type(self) -> str:
        return "fundus-jax-chat"

    def with_structured_output(  # type: ignore[override]
        self, schema: type[pydantic.BaseModel], **_: Any
    ) -> Runnable[Any, pydantic.BaseModel]:
        """A runnable from messages to a `schema`; it raises ChatError where there is no such answer."""
        return self.bind(schema=schema) | PydanticOutputParser(pydantic_object=schema)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        *,
        schema: type[pydantic.BaseModel],
        **_: Any,
    ) -> ChatResult:
        sent: Any = convert_to_openai_messages(messages)
        [answer] = await self.chat.ask(sent, schema, max_tokens=self.answer_tokens)
        if isinstance(answer, ChatError):
            raise answer
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=answer.model_dump_json()))])

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **_: Any,
    ) -> ChatResult:
        raise TypeError("ServerModel belongs to an event loop: use ainvoke")
