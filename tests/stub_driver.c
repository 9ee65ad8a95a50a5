/* Stands in for NVIDIA's driver, libcuda.so.1: notes what each launch would hand to the GPU, and launches nothing.

   A driver copies the i-th of kernelParams to the place in the kernel's parameter memory, and in the size, that the
   machine code names, and nobody else tells it how many there are. So does this, from the same table. What else Triton
   asks for is answered so that it goes on. */

#include <cuda.h>
#include <elf.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 64, BYTES = 4096, CONTEXT = 1 };
enum { SIZED_VALUE = 4, PARAMETER_BYTES = 0x19, PARAMETER = 0x17 }; // in .nv.info.KERNEL: a form, two attributes

typedef struct {
  char name[64];
  unsigned count, bytes;
  struct {
    unsigned short offset, size;
  } parameters[MOST];
} Kernel;

static char notes[1 << 20];
static size_t noted;
static unsigned asked;

/* The launches since the last call, one line of JSON each. */
const char *take_notes(void) {
  notes[noted] = 0;
  noted = 0;
  return notes;
}

static bool read_parameters(Kernel *kernel, const unsigned char *at, size_t length) {
  const unsigned char *end = at + length;
  while (at + 4 <= end) {
    unsigned short value;
    memcpy(&value, at + 2, sizeof value);
    if (at[1] == PARAMETER_BYTES)
      kernel->bytes = value;
    if (at[1] == PARAMETER) { // index, ordinal and offset, then the size in the upper 14 bits
      unsigned short place[2];
      unsigned packed;
      memcpy(place, at + 8, sizeof place);
      memcpy(&packed, at + 12, sizeof packed);
      if (place[0] >= MOST || place[1] + (packed >> 18) > BYTES)
        return false;
      kernel->parameters[place[0]].offset = place[1];
      kernel->parameters[place[0]].size = packed >> 18;
      kernel->count++;
    }
    at += 4 + (at[0] == SIZED_VALUE ? value : 0);
  }
  return kernel->count > 0 && kernel->bytes <= BYTES;
}

/* Triton's modules have one kernel each. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG))
    return CUDA_ERROR_INVALID_IMAGE;
  const char *file = image, prefix[] = ".nv.info.";
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(file + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = file + sections[header->e_shstrndx].sh_offset + sections[i].sh_name;
    if (strncmp(name, prefix, strlen(prefix)))
      continue;
    Kernel *kernel = calloc(1, sizeof *kernel);
    snprintf(kernel->name, sizeof kernel->name, "%s", name + strlen(prefix));
    *module = (CUmodule)kernel;
    bool read = read_parameters(kernel, (const unsigned char *)file + sections[i].sh_offset, sections[i].sh_size);
    return read ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
  }
  return CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return strcmp(((Kernel *)module)->name, name) ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  unsigned char memory[BYTES] = {0};
  if (extra || noted + 2 * BYTES + 512 > sizeof notes)
    return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < kernel->count; i++)
    memcpy(memory + kernel->parameters[i].offset, parameters[i], kernel->parameters[i].size);
  noted += sprintf(notes + noted, "{\"kernel\": \"%s\", \"function\": %zu, \"grid\": [%u, %u, %u], ", kernel->name,
                   (size_t)function, config->gridDimX, config->gridDimY, config->gridDimZ);
  noted += sprintf(notes + noted, "\"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %zu, \"attributes\": %u, ",
                   config->blockDimX, config->blockDimY, config->blockDimZ, config->sharedMemBytes,
                   (size_t)config->hStream, config->numAttrs);
  noted += sprintf(notes + noted, "\"count\": %u, \"asked\": %u, \"parameters\": \"", kernel->count, asked);
  for (unsigned i = 0; i < kernel->bytes; i++)
    noted += sprintf(notes + noted, "%02x", memory[i]);
  noted += sprintf(notes + noted, "\"}\n");
  asked = 0;
  return CUDA_SUCCESS;
}

/* All memory is the GPU's, under its own address. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
  asked++;
  memcpy(data, &address, sizeof address);
  return attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 1 << 17; // enough shared memory, for one
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)CONTEXT;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "from the stub";
  return CUDA_SUCCESS;
}

/* Linked by Triton's launcher, and not called. */
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDriverGetVersion(int *version) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_ERROR_NOT_SUPPORTED; }
