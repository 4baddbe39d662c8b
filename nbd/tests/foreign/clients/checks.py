# Run by nbdsh with the disk as `h` and base:allocation negotiated. What the library would refuse by itself goes out too.
h.set_strict_mode(0)
size = h.get_size()
KIB, MIB = 1 << 10, 1 << 20


def outcome(request, *arguments):
    try:
        request(*arguments)
        return "OK"
    except nbd.Error as error:
        return error.errno


def chunks(length, offset, flags=0):
    seen = []
    h.pread_structured(length, offset, lambda data, at, kind, error: seen.append((at, len(data), kind)), flags)
    return sorted(seen)


def extents(length, offset, flags=0):
    seen = []
    h.block_status(length, offset, lambda context, at, entries, error: seen.extend(entries), flags)
    return seen


# A library that knows extended headers must have got them.
if hasattr(h, "get_extended_headers_negotiated"):
    assert h.get_extended_headers_negotiated()

# Past the end: what adds data finds no space, the rest is invalid.
for request, expected in [
    (lambda: h.pwrite(bytes(KIB), size - 512), "ENOSPC"),
    (lambda: h.zero(KIB, size - 512), "ENOSPC"),
    (lambda: h.pread(KIB, size - 512), "EINVAL"),
    (lambda: h.trim(KIB, size - 512), "EINVAL"),
    (lambda: h.cache(KIB, size - 512), "EINVAL"),
    (lambda: extents(KIB, size - 512), "EINVAL"),
    # Flags that are none of the command's, or nobody's.
    (lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE), "EINVAL"),
    (lambda: h.pwrite(bytes(512), 0, nbd.CMD_FLAG_FAST_ZERO), "EINVAL"),
    (lambda: h.pread(512, 0, 0x4000), "EINVAL"),
    (lambda: h.trim(512, 0, nbd.CMD_FLAG_REQ_ONE), "EINVAL"),
    # FUA is everybody's.
    (lambda: h.pread(512, 0, nbd.CMD_FLAG_FUA), "OK"),
    (lambda: h.flush(nbd.CMD_FLAG_FUA), "OK"),
    (lambda: h.cache(MIB, 0, nbd.CMD_FLAG_FUA), "OK"),
    # Nothing is a legal length, except of an extent.
    (lambda: h.pread(0, 0), "OK"),
    (lambda: h.pwrite(b"", size), "OK"),
    (lambda: extents(0, 0), "EINVAL"),
]:
    found = outcome(request)
    assert found == expected, (found, expected)

# Holes travel as holes unless they must not be told apart, and neighbours are joined.
DATA, HOLE = nbd.READ_DATA, nbd.READ_HOLE
h.zero(MIB, 0)
h.pwrite(b"q" * (64 * KIB), 256 * KIB)
assert chunks(MIB, 0) == [(0, 256 * KIB, HOLE), (256 * KIB, 64 * KIB, DATA), (320 * KIB, 704 * KIB, HOLE)], chunks(MIB, 0)
assert chunks(MIB, 0, nbd.CMD_FLAG_DF) == [(0, MIB, DATA)], chunks(MIB, 0, nbd.CMD_FLAG_DF)
assert extents(MIB, 0) == [256 * KIB, 3, 64 * KIB, 0, 704 * KIB, 3], extents(MIB, 0)
assert extents(MIB, 0, nbd.CMD_FLAG_REQ_ONE) == [256 * KIB, 3]

# Zeroes that must be quick leave alone what they cannot do quickly.
assert outcome(h.zero, 100, 256 * KIB + 7, nbd.CMD_FLAG_FAST_ZERO) == "ENOTSUP"
assert h.pread(64 * KIB, 256 * KIB) == b"q" * (64 * KIB)
assert outcome(h.zero, 64 * KIB, 256 * KIB, nbd.CMD_FLAG_FAST_ZERO) == "OK"
assert h.pread(64 * KIB, 256 * KIB) == bytes(64 * KIB)

# Zeroes with space are no hole, and what was trimmed is one.
h.pwrite(b"n" * (64 * KIB), 128 * KIB)
h.zero(64 * KIB, 128 * KIB, nbd.CMD_FLAG_NO_HOLE)
length, status = extents(64 * KIB, 128 * KIB)
assert length == 64 * KIB and status & nbd.STATE_HOLE == 0, (length, status)
h.pwrite(b"t" * (128 * KIB), 512 * KIB, nbd.CMD_FLAG_FUA)
h.trim(64 * KIB, 512 * KIB, nbd.CMD_FLAG_FUA)
assert extents(128 * KIB, 512 * KIB) == [64 * KIB, 3, 64 * KIB, 0], extents(128 * KIB, 512 * KIB)
assert h.pread(128 * KIB, 512 * KIB) == bytes(64 * KIB) + b"t" * (64 * KIB)

assert len(h.pread(1, size - 1)) == 1
h.shutdown()
