// Replays calls of kernels that test_arm.py recorded: reads them from the first file, writes the contents of their memory
// afterwards to the second. All numbers of the files have 8 bytes; a name and a block's bytes are padded to 8.
//
// A block ends at a page that cannot be read: a kernel that accesses memory beyond a tensor ends the program.
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

// kernels.inc: KERNEL(name) for each.
#define KERNEL(NAME) extern "C" void NAME();
#include "kernels.inc"
#undef KERNEL

namespace {

constexpr int MOST = 14;  // most integers and addresses of a call

// They are passed in the order of the call, regardless of doubles between them: eight in registers, then on the stack, where
// further ones do no harm. Doubles have registers of their own (AAPCS64, section 6.8.2).
typedef int64_t I;
typedef void (*Kernel)(I, I, I, I, I, I, I, I, I, I, I, I, I, I, double, double);

const std::map<std::string, void (*)()> KERNELS = {
#define KERNEL(NAME) {#NAME, NAME},
#include "kernels.inc"
#undef KERNEL
};

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

std::string running = "nothing";  // the kernel that is being called
void report(int) {
  std::fprintf(stderr, "%s accessed memory beyond its blocks\n", running.c_str());
  _exit(1);
}

void read(std::FILE* file, void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, file) != bytes) fail("the file of calls ends too early");
}
int64_t number(std::FILE* file) {
  int64_t found;
  read(file, &found, sizeof(found));
  return found;
}

// Memory of the size, a multiple of 8, before a page that cannot be read.
class Block {
 public:
  explicit Block(int64_t size) : size(size) {
    const int64_t page = sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
    held_ = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (held_ == MAP_FAILED) fail("no memory for a block");
    mapped_ = whole + page, data = static_cast<char*>(held_) + whole - size;
    if (mprotect(data + size, page, PROT_NONE)) fail("no end of a block");
  }
  void free() { munmap(held_, mapped_); }
  int64_t size;
  char* data;

 private:
  void* held_;
  int64_t mapped_;
};

void replay(std::FILE* calls, std::FILE* results) {
  std::string name(number(calls), ' ');
  read(calls, &name[0], name.size());
  name = name.c_str();
  int64_t integers[MOST] = {};
  double reals[2] = {};
  const int64_t num_integers = number(calls), num_reals = number(calls);
  if (num_integers > MOST || num_reals > 2) fail(name + " has too many arguments");
  read(calls, integers, num_integers * sizeof(int64_t));
  read(calls, reals, num_reals * sizeof(double));
  std::vector<Block> blocks;
  for (int64_t left = number(calls); left > 0; left--) {
    blocks.emplace_back(number(calls));
    read(calls, blocks.back().data, blocks.back().size);
  }
  for (int64_t left = number(calls); left > 0; left--) {  // addresses: where they lie, and what they lead to
    const int64_t block = number(calls), offset = number(calls), of = number(calls), at = number(calls);
    const char* address = blocks[of].data + at;
    char* holder = block < 0 ? reinterpret_cast<char*>(integers) : blocks[block].data;
    std::memcpy(holder + offset, &address, sizeof(address));
  }
  const auto found = KERNELS.find(name);
  if (found == KERNELS.end()) fail("no kernel " + name);
  running = name;
  const int64_t* i = integers;
  const auto kernel = reinterpret_cast<Kernel>(found->second);
  kernel(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13], reals[0], reals[1]);
  for (Block& block : blocks) {
    if (std::fwrite(block.data, 1, block.size, results) != size_t(block.size)) fail("cannot write the results");
    block.free();
  }
}

}  // namespace

int main(int, char** files) {
  std::FILE *calls = std::fopen(files[1], "rb"), *results = std::fopen(files[2], "wb");
  if (!calls || !results) fail("cannot open the files");
  std::signal(SIGSEGV, report);
  for (int64_t left = number(calls); left > 0; left--) replay(calls, results);
  return std::fclose(results);
}
