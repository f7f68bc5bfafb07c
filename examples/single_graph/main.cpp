// A picture by a graph that `ovforge single-graph` wrote: OpenVINO and its tokenizers' operations, nothing else.
// Usage: picture MODEL.xml TOKENIZERS_LIBRARY PROMPT SEED PICTURE.ppm [GUIDANCE_SCALE]
#include <algorithm>
#include <fstream>
#include <iostream>
#include <random>
#include <stdexcept>

#include <openvino/openvino.hpp>

int main(int count, char** words) try {
    if (count != 6 && count != 7) {
        std::cerr << "usage: picture MODEL.xml TOKENIZERS_LIBRARY PROMPT SEED PICTURE.ppm [GUIDANCE_SCALE]\n";
        return 2;
    }
    ov::Core core;
    core.add_extension(words[2]);
    auto request = core.compile_model(words[1], "CPU").create_infer_request();
    std::mt19937 generator(std::stoul(words[4]));
    std::normal_distribution<float> normal;
    bool guided = false;
    for (const auto& input : request.get_compiled_model().inputs()) {
        if (input.get_partial_shape().is_dynamic()) throw std::runtime_error("the graph takes any number of pictures: write it without --batch 0");
        auto tensor = request.get_tensor(input);
        auto name = input.get_any_name();
        if (name == "prompt") {  // one for each picture; negative_prompt, if there is guidance, stays empty
            std::fill_n(tensor.data<std::string>(), tensor.get_size(), words[3]);
        } else if (name == "guidance_scale") {  // with --guidance-input
            if (count < 7) throw std::runtime_error("the graph takes a guidance scale: give it as the last word");
            *tensor.data<float>() = std::stof(words[6]);
            guided = true;
        } else if (name != "negative_prompt") {  // latents, and noise if the sampling method adds some
            std::generate_n(tensor.data<float>(), tensor.get_size(), [&] { return normal(generator); });
        }
    }
    if (count == 7 && !guided) throw std::runtime_error("the graph takes no guidance scale: leave it out");
    request.infer();
    auto image = request.get_tensor("image");  // uint8 (pictures, height, width, 3): the first of them is written
    auto height = image.get_shape()[1], width = image.get_shape()[2];
    std::ofstream file(words[5], std::ios::binary);
    file << "P6\n" << width << " " << height << "\n255\n";
    file.write(reinterpret_cast<const char*>(image.data<uint8_t>()), height * width * 3);
    if (!file.flush()) throw std::runtime_error(std::string("cannot write ") + words[5]);
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
