# Run by nbdsh with `uri` set: 8 connections, each with 64 requests in flight at a time; what is written is read back over
# another connection.
import hashlib
import select

CONNECTIONS, FLIGHT, BLOCK = 8, 64, 12_345
handles = []
for _ in range(CONNECTIONS):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handles.append(handle)
blocks = handles[0].get_size() // BLOCK // CONNECTIONS


def content(block):
    return (hashlib.sha256(str(block).encode()).digest() * (BLOCK // 32 + 1))[:BLOCK]


def drive(start):
    """Keeps every connection full: start(connection) begins a request, or tells that there are no more."""
    busy, most = set(range(CONNECTIONS)), 0
    while busy:
        poller = select.poll()
        for number in sorted(busy):
            while handles[number].aio_in_flight() < FLIGHT and start(number):
                pass
            most = max(most, handles[number].aio_in_flight())
            if handles[number].aio_in_flight() == 0:
                busy.discard(number)
                continue
            direction = handles[number].aio_get_direction()
            events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
            events |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            poller.register(handles[number].aio_get_fd(), events)
        if not busy:
            break
        ready = dict(poller.poll())
        for number in busy:
            events = ready.get(handles[number].aio_get_fd(), 0)
            direction = handles[number].aio_get_direction()
            if events & (select.POLLIN | select.POLLHUP) and direction & nbd.AIO_DIRECTION_READ:
                handles[number].aio_notify_read()
            elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                handles[number].aio_notify_write()
    assert most == FLIGHT, most


done = []


def completed(then):
    def callback(error):
        assert error.value == 0, error.value
        then()
        done.append(1)
        return 1

    return callback


turn = [0] * CONNECTIONS


def write(number):
    if turn[number] == blocks:
        return False
    block = turn[number] * CONNECTIONS + number
    turn[number] += 1
    data = nbd.Buffer.from_bytearray(bytearray(content(block)))
    handles[number].aio_pwrite(data, block * BLOCK, completed(lambda: None))
    return True


drive(write)
assert len(done) == blocks * CONNECTIONS
for handle in handles:
    handle.flush()
done.clear()
turn = [0] * CONNECTIONS


def read(number):
    if turn[number] == blocks:
        return False
    block = turn[number] * CONNECTIONS + (number + 1) % CONNECTIONS
    turn[number] += 1
    data = nbd.Buffer(BLOCK)

    def verify():
        assert data.to_bytearray() == content(block), block

    handles[number].aio_pread(data, block * BLOCK, completed(verify))
    return True


drive(read)
assert len(done) == blocks * CONNECTIONS
for handle in handles:
    handle.shutdown()
