// A picture by a graph that `ovforge single-graph` wrote: OpenVINO and its tokenizers' operations, nothing else.
// Usage: picture MODEL.xml TOKENIZERS_LIBRARY PROMPT SEED PICTURE.ppm
#include <algorithm>
#include <fstream>
#include <iostream>
#include <random>

#include <openvino/openvino.hpp>

int main(int count, char** words) try {
    if (count != 6) {
        std::cerr << "usage: picture MODEL.xml TOKENIZERS_LIBRARY PROMPT SEED PICTURE.ppm\n";
        return 2;
    }
    ov::Core core;
    core.add_extension(words[2]);
    auto request = core.compile_model(words[1], "CPU").create_infer_request();
    std::string prompt = words[3], nothing;
    std::mt19937 generator(std::stoul(words[4]));
    std::normal_distribution<float> normal;
    for (const auto& input : request.get_compiled_model().inputs()) {
        if (input.get_element_type() == ov::element::string) {  // prompt, and negative_prompt if there is guidance
            request.set_tensor(input, ov::Tensor(ov::element::string, {1}, input.get_any_name() == "prompt" ? &prompt : &nothing));
            continue;
        }
        auto tensor = request.get_tensor(input);  // latents, and noise if the sampling method adds some
        std::generate_n(tensor.data<float>(), tensor.get_size(), [&] { return normal(generator); });
    }
    request.infer();
    auto image = request.get_tensor("image");  // uint8 (pictures, height, width, 3)
    std::ofstream file(words[5], std::ios::binary);
    file << "P6\n" << image.get_shape()[2] << " " << image.get_shape()[1] << "\n255\n";
    file.write(reinterpret_cast<const char*>(image.data<uint8_t>()), image.get_byte_size());
    return file.good() ? 0 : 1;
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
