// Many small writes to many sockets, without the interpreter's lock: in Python each write would release it and wait for
// it again, against an engine that needs it between kernels.

#include <sys/socket.h>
#include <sys/types.h>

#ifdef MSG_NOSIGNAL
constexpr int FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL;
#else
constexpr int FLAGS = MSG_DONTWAIT;  // Python ignores SIGPIPE
#endif

// sent[i]: how many bytes of the i-th chunk left, 0 where the socket took none or has failed.
extern "C" void send_chunks(int num, const int* sockets, const char* const* chunks, const long* sizes, long* sent) {
    for (int i = 0; i < num; i++) {
        const ssize_t done = send(sockets[i], chunks[i], sizes[i], FLAGS);
        sent[i] = done > 0 ? done : 0;
    }
}
