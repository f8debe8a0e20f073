// A file that is open for appending, written by other ways than that: each byte must be where it was put. Ends with 0, or says what was wrong.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void need(int good, const char *what) {
  if (good) return;
  fprintf(stderr, "%s (%s)\n", what, strerror(errno));
  exit(1);
}

// By another descriptor, of what the file system has.
static void expect(const char *content, const char *after) {
  char found[100] = {0};
  int file = open("file", O_RDONLY);
  need(file >= 0 && read(file, found, sizeof found - 1) >= 0, "read");
  close(file);
  if (strcmp(found, content)) {
    fprintf(stderr, "after %s: %s, not %s\n", after, found, content);
    exit(1);
  }
}

int main(void) {
  int file = open("file", O_RDWR | O_CREAT | O_APPEND, 0644);
  need(file >= 0 && write(file, "one.", 4) == 4, "write");
  char *mapped = mmap(0, 4, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  need(mapped != MAP_FAILED, "map");
  mapped[0] = 'O';
  need(msync(mapped, 4, MS_SYNC) == 0, "msync");
  expect("One.", "a page was written back");
  need(write(file, "two.", 4) == 4, "append");
  expect("One.two.", "more was appended");
  need(fcntl(file, F_SETFL, 0) == 0 && pwrite(file, "N", 1, 1) == 1, "write where it says");
  expect("ONe.two.", "a descriptor that appends no longer");
  need(fcntl(file, F_SETFL, O_APPEND) == 0 && write(file, "three.", 6) == 6, "append again");
  expect("ONe.two.three.", "a descriptor that appends again");
  mapped[2] = 'E';
  need(munmap(mapped, 4) == 0 && fsync(file) == 0 && close(file) == 0, "unmap");
  expect("ONE.two.three.", "the end of the mapping");
  return 0;
}
