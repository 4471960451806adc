"""A pickle from outside, read as data: nothing that it names is imported, and nothing is called.

The standard unpickler does what a pickle says: it fetches objects by name, calls them, sets their state. A
subclass that gives out harmless objects only still hashes whatever a pickle uses as a key, and some hundred
bytes of nested tuples make that endless, a deeper nest ends the interpreter. So the opcodes are decoded here
(by `pickletools`, of the standard library) and read into six kinds of value:

    dict, list, tuple       of a dict, keys that are plain; one filled by the pickle is never a subclass
    number, text, bytes     as they are; an integer beyond 64 bits becomes a `Name`
    Storage                 what torch.save writes in place of a tensor's numbers
    View                    a call of torch's tensor builders: which part of a storage a tensor is
    Name                    every class or function, and everything made by one: a name and nothing more

Nothing here walks into a value, so the depth and the repetition of what a pickle holds cost nothing; the
number of its bytes and of its opcodes is limited.
"""

import pickletools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ldm.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 1_000_000  # some 30 for each tensor
MAX_KEY_LETTERS = 1024  # equal keys are compared letter by letter, each time that one is set
MAX_INTEGER = 1 << 64
MAX_NAME_LETTERS = 1024  # of a module, or of a class in it
MAX_ARGUMENTS = 16  # more than any of torch's builders takes
NUM_LETTERS_SHOWN = 80  # of a foreign name, in a message


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A class, a function, or an object made by one: inert, equal to itself alone."""

    dotted: str

    def __repr__(self) -> str:
        return f"<{ascii(self.dotted[:NUM_LETTERS_SHOWN])[1:-1]}>"


@dataclass(frozen=True, slots=True)
class Storage:
    """The numbers of one or more tensors, by the name of their file; nothing is verified yet."""

    kind: str
    """Of the elements, such as torch.FloatStorage."""
    key: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as part of a storage; offset, size and stride count elements, and are not verified yet."""

    storage: Storage
    offset: int
    size: tuple[Any, ...]
    stride: tuple[Any, ...]


def read_pickle(data: bytes) -> object:
    """The value that a pickle of protocol 2 to 5 describes.

    Raises:
        CheckpointError: the pickle is damaged, too large, or uses an opcode that torch.save does not.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"the pickle has {len(data)} bytes, over {MAX_PICKLE_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # a name with a broken escape in it
            return read_opcodes(pickletools.genops(data), num_bytes=len(data))
    except (ValueError, DeprecationWarning) as error:
        raise CheckpointError(f"the pickle is damaged: {error}") from error


def read_opcodes(opcodes: Iterable[tuple[Any, Any, Any]], *, num_bytes: int) -> object:
    """The value that decoded opcodes, with their arguments and positions, build on a stack."""
    reader = Reader()
    for number, (opcode, argument, position) in enumerate(opcodes):
        if number >= MAX_OPCODES:
            raise CheckpointError(f"the pickle has more than {MAX_OPCODES} opcodes")
        if opcode.name == "STOP":
            return reader.result(num_unread=num_bytes - position - 1)
        if opcode.name not in OPCODES:
            raise CheckpointError(f"the pickle uses the opcode {opcode.name}")
        try:
            OPCODES[opcode.name](reader, argument)
        except (IndexError, KeyError) as error:
            raise CheckpointError(
                f"the pickle's {opcode.name} at byte {position} needs what is not there"
            ) from error
    raise CheckpointError("the pickle does not end")


class Reader:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def result(self, *, num_unread: int) -> object:
        """The one value that is left at the end."""
        if len(self.stack) != 1 or self.outer or num_unread:
            raise CheckpointError("the pickle does not end with one value")
        return self.stack[0]

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def push_integer(self, value: int) -> None:
        """Put a number on the stack; a very long one by name, for its arithmetic has no bound."""
        self.push(value if abs(value) < MAX_INTEGER else Name("builtins.int"))

    def pop(self, count: int) -> list[Any]:
        """Take the last values off the stack, in their order."""
        values = [self.stack.pop() for _ in range(count)]
        return values[::-1]

    def mark(self) -> None:
        """Begin a group of values."""
        self.outer.append(self.stack)
        self.stack = []

    def pop_group(self) -> list[Any]:
        """Take off all values since the last mark."""
        group, self.stack = self.stack, self.outer.pop()
        return group

    def forget_group(self, value: Name) -> None:
        """Replace all values since the last mark by a name."""
        self.pop_group()
        self.push(value)

    def remember(self, index: int | None) -> None:
        """Keep the last value for later use; without an index, under the next one."""
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def push_name(self, module: object, name: object) -> None:
        """Put a class or function on the stack, as a name."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise CheckpointError("the pickle names a class by what is no text")
        if max(len(module), len(name)) > MAX_NAME_LETTERS:
            raise CheckpointError(f"the pickle holds a name of more than {MAX_NAME_LETTERS} letters")
        self.push(Name(f"{module}.{name}"))

    def push_storage(self) -> None:
        """Replace a persistent id by the storage that it means."""
        match self.stack.pop():
            case ("storage", Name(dotted=kind), str(key), str(), int(count)):
                self.push(Storage(kind, key, count))
            case _:
                raise CheckpointError(
                    "the pickle holds a persistent id that is no ('storage', type, key, place, numel)"
                )

    def construct(self, num_arguments: int) -> None:
        """Replace a class or function and what it is called with by what comes of it."""
        maker, arguments, *_ = self.pop(1 + num_arguments)
        if not isinstance(maker, Name):
            raise CheckpointError("the pickle calls what is neither a class nor a function")
        self.push(constructed(maker, arguments))

    def extend(self, values: list[Any]) -> None:
        """Append values to the list below them; a `Name` takes them and stays as it is."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Name):
            raise CheckpointError("the pickle appends to what is no list")

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values of the dict below them; a `Name` takes them and stays as it is."""
        target = self.stack[-1]
        if len(items) % 2:
            raise CheckpointError("the pickle sets a key without its value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[plain_key(key)] = value
        elif not isinstance(target, Name):
            raise CheckpointError("the pickle sets an item of what is no dict")

    def drop_state(self) -> None:
        """Take off the state that an object would be given: a dict keeps its items, a `Name` has none."""
        target, _ = self.pop(2)
        if not isinstance(target, dict | Name):
            raise CheckpointError("the pickle gives state to what is no object")
        self.push(target)


def constructed(maker: Name, arguments: object) -> object:
    """What calling a foreign name stands for: an empty dict, a view of a storage, or again a name."""
    if not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS:
        return Name(maker.dotted)
    match maker.dotted, arguments:
        case "collections.OrderedDict", ():
            return {}
        case (
            "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
            (Storage() as storage, int(offset), tuple(size), tuple(stride), *others),
        ) if not any(
            others[2:]
        ):  # after requires_grad and hooks: "conjugate" and the like, which change numbers
            return View(storage, offset, size, stride)
        case "torch._utils._rebuild_parameter", (View() as view, *_):
            return view
    return Name(maker.dotted)


def plain_key(key: object) -> object:
    """A key that is cheap to hash and to compare; any other is replaced by a `Name` of its type."""
    if isinstance(key, str):
        return key if len(key) <= MAX_KEY_LETTERS else Name("builtins.str")
    return (
        key if key is None or isinstance(key, int | float | Name) else Name(f"builtins.{type(key).__name__}")
    )


OPCODES: dict[str, Callable[[Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), Reader.push_integer),
    **dict.fromkeys(("BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), Reader.push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), Reader.push),
    "BYTEARRAY8": lambda reader, argument: reader.push(Name("builtins.bytearray")),
    "NONE": lambda reader, argument: reader.push(None),
    "NEWTRUE": lambda reader, argument: reader.push(True),
    "NEWFALSE": lambda reader, argument: reader.push(False),
    "EMPTY_TUPLE": lambda reader, argument: reader.push(()),
    "EMPTY_LIST": lambda reader, argument: reader.push([]),
    "EMPTY_DICT": lambda reader, argument: reader.push({}),
    "EMPTY_SET": lambda reader, argument: reader.push(Name("builtins.set")),
    "MARK": lambda reader, argument: reader.mark(),
    "TUPLE": lambda reader, argument: reader.push(tuple(reader.pop_group())),
    "TUPLE1": lambda reader, argument: reader.push(tuple(reader.pop(1))),
    "TUPLE2": lambda reader, argument: reader.push(tuple(reader.pop(2))),
    "TUPLE3": lambda reader, argument: reader.push(tuple(reader.pop(3))),
    "APPEND": lambda reader, argument: reader.extend(reader.pop(1)),
    "APPENDS": lambda reader, argument: reader.extend(reader.pop_group()),
    "ADDITEMS": lambda reader, argument: reader.extend(reader.pop_group()),
    "SETITEM": lambda reader, argument: reader.set_items(reader.pop(2)),
    "SETITEMS": lambda reader, argument: reader.set_items(reader.pop_group()),
    "FROZENSET": lambda reader, argument: reader.forget_group(Name("builtins.frozenset")),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), Reader.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda reader, index: reader.push(reader.memo[index])),
    "GLOBAL": lambda reader, argument: reader.push_name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda reader, argument: reader.push_name(*reader.pop(2)),
    "BINPERSID": lambda reader, argument: reader.push_storage(),
    "REDUCE": lambda reader, argument: reader.construct(1),
    "NEWOBJ": lambda reader, argument: reader.construct(1),
    "NEWOBJ_EX": lambda reader, argument: reader.construct(2),
    "BUILD": lambda reader, argument: reader.drop_state(),
}
"""What each opcode does. Left out is what torch.save never writes: text forms; INST, OBJ, EXT, which call."""
