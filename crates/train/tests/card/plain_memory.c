/* A Vulkan layer that says of every device: no device scope in the Vulkan memory model.
 *
 * CubeCL hands a device its own SPIR-V when that scope and buffer addresses are there, and WGSL otherwise, which wgpu
 * translates. Software drivers promise both and then break on that SPIR-V: Mesa 22's llvmpipe crashes while it compiles,
 * SwiftShader computes zeros. Behind this layer they get WGSL. Cards do not need it.
 *
 * The few declarations of vulkan.h and vk_layer.h that it takes are here, so that nothing has to be installed. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef void (*Function)(void);
typedef Function (*GetInstanceProc)(void *instance, const char *name);

/* The beginning of every structure that Vulkan chains. */
typedef struct Chained {
    int32_t type;
    struct Chained *next;
} Chained;

typedef struct Link {
    struct Link *next;
    GetInstanceProc get;
    Function get_physical;
} Link;

typedef struct {
    Chained head;
    int32_t function; /* 0: `link` is the layer below this one */
    Link *link;
} CreateInfo;

typedef struct {
    int32_t type;
    void *next;
    uint32_t version;
    GetInstanceProc get;
    Function get_device, get_physical;
} Negotiate;

typedef struct {
    Chained head;
    uint32_t model, device_scope, chains;
} MemoryModel;

enum { LOADER_INSTANCE_CREATE_INFO = 47, MEMORY_MODEL_FEATURES = 1000211000, INITIALIZATION_FAILED = -3 };

typedef void (*Features)(void *device, Chained *asked);
typedef int32_t (*CreateInstance)(const Chained *info, const void *allocator, void **instance);

static GetInstanceProc below;
static Features features_below;

static void features(void *device, Chained *asked)
{
    features_below(device, asked);
    for (Chained *found = asked; found; found = found->next)
        if (found->type == MEMORY_MODEL_FEATURES)
            ((MemoryModel *)found)->device_scope = 0;
}

static int32_t create_instance(const Chained *info, const void *allocator, void **instance)
{
    Chained *found = info->next;
    while (found && !(found->type == LOADER_INSTANCE_CREATE_INFO && ((CreateInfo *)found)->function == 0))
        found = found->next;
    if (!found)
        return INITIALIZATION_FAILED;
    CreateInfo *chain = (CreateInfo *)found;
    below = chain->link->get;
    chain->link = chain->link->next;
    int32_t result = ((CreateInstance)below(NULL, "vkCreateInstance"))(info, allocator, instance);
    /* Now: once the instance is whole, the loader answers with the first layer, this one. */
    if (result == 0)
        features_below = (Features)below(*instance, "vkGetPhysicalDeviceFeatures2");
    return result;
}

static Function get(void *instance, const char *name)
{
    if (!strcmp(name, "vkGetInstanceProcAddr"))
        return (Function)get;
    if (!strcmp(name, "vkCreateInstance"))
        return (Function)create_instance;
    if (!strcmp(name, "vkGetPhysicalDeviceFeatures2") || !strcmp(name, "vkGetPhysicalDeviceFeatures2KHR"))
        return (Function)features;
    return below ? below(instance, name) : NULL;
}

int32_t vkNegotiateLoaderLayerInterfaceVersion(Negotiate *with)
{
    with->version = 2;
    with->get = get;
    with->get_device = NULL;
    with->get_physical = NULL;
    return 0;
}
